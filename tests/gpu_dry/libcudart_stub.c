/* CUDA's runtime, as far as autograd's engine asks it where there are tensors on a device but no data: one device, its
   number, and its range of streams. Preloaded (LD_PRELOAD), so that it answers before the real one. */
int cudaGetDeviceCount(int *count) {
    *count = 1;
    return 0;
}

int cudaGetDevice(int *device) {
    *device = 0;
    return 0;
}

int cudaSetDevice(int device) {
    return device != 0; /* 1: cudaErrorInvalidValue */
}

int cudaDeviceGetStreamPriorityRange(int *least, int *greatest) {
    *least = 0;
    *greatest = -5;
    return 0;
}
