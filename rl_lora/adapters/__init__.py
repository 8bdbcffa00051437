"""An adapter on disk: written, read, resized, described."""
