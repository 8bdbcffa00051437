"""A tiny Llama with a digit-level tokenizer, pre-trained on generated arithmetic.

It is the base model of tests and of studies with many seeds: it answers in the requested format and
solves some of the problems at temperature 1, so that RL has something to improve. Training takes a
minute or two on a CPU and is deterministic for a recipe and seed on one machine.

The training loop is separate from Policy and Learner because their packed rows sum in another
order, which would change the weights that the studies in docs/ were run on.
"""

from __future__ import annotations

import hashlib
import random
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from rl_lora.config import DataSection, SourceSection
from rl_lora.data.chats import finish_solution
from rl_lora.data.generators import generated_rows
from rl_lora.data.row_formats import last_boxed
from rl_lora.prompts import load_prompt_sets
from rl_lora.seeds import mix_seed
from rl_lora.storage.jsonl import write_json
from rl_lora.types import Prompt

if TYPE_CHECKING:
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

END, PAD, SYSTEM, USER, ASSISTANT = "<|end|>", "<|pad|>", "<|system|>", "<|user|>", "<|assistant|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
_FORMAT = 1  # part of the cache key: incremented when the code below makes another model


@dataclass(frozen=True, slots=True)
class TinyRecipe:
    """What makes a tiny model. Example: see RECIPES."""

    description: str
    sources: tuple[SourceSection, ...]  # problems to learn; num_rows of each are made
    hidden_size: int = 128
    num_layers: int = 2
    head_dim: int = 32
    intermediate_size: int = 1024
    vocab_size: int = 1024
    context_length: int = 1024
    # The usual 0.02 suits widths of 768 and more; at these widths, copying a number is then learned
    # about four times later.
    init_std: float = 0.09
    rope_theta: float = 100.0  # sequences are short
    batch_size: int = 32
    lr: float = 2e-3
    num_steps: int = 1000  # optimizer steps, in several passes over the problems
    num_eval: int = 400  # held-out problems for measuring accuracy
    num_threads: int = 2  # fixed, as it determines the order of summation
    seed: int = 0
    # Share of sums in the solutions that are made wrong, independently in each of `num_copies`
    # copies of a problem. The model then errs at random, not systematically: the right answer is
    # always the most likely one, so every group of samples has something to reinforce.
    noise: float = field(default=0.0, repr=False)
    num_copies: int = field(default=1, repr=False)

    def key(self) -> str:
        """The cache key of the recipe, 8 hex digits."""
        text = f"{_FORMAT} {self!r}"
        if self.noise:
            text += f" noise={self.noise} num_copies={self.num_copies}"
        return hashlib.sha256(text.encode()).hexdigest()[:8]

    def config(self, **token_ids: Any) -> LlamaConfig:
        """The model's shape."""
        from transformers import LlamaConfig

        return LlamaConfig(
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
            num_hidden_layers=self.num_layers,
            num_attention_heads=self.hidden_size // self.head_dim,
            num_key_value_heads=self.hidden_size // self.head_dim,
            head_dim=self.head_dim,
            initializer_range=self.init_std,
            rope_parameters={"rope_type": "default", "rope_theta": self.rope_theta},
            max_position_embeddings=self.context_length,
            tie_word_embeddings=True,
            bos_token_id=None,
            dtype="float32",
            **token_ids,
        )


def _made(name: str, num_rows: int, **options: Any) -> SourceSection:
    # Jobs use other seeds, so their problems are mostly unseen.
    return SourceSection(name=f"generated:{name}", num_rows=num_rows, seed=1001, options=options)


_FAST = TinyRecipe(
    "Llama of 0.14 M parameters trained here in seconds, for tests: chains of one-digit sums",
    sources=(_made("chain_sum", 4200, max_terms=3, max_digits=1),),
    hidden_size=64,
    intermediate_size=192,
    vocab_size=512,
    init_std=0.1,
    lr=3e-3,
    num_steps=425,
    num_eval=200,
    num_threads=1,
)

RECIPES: dict[str, TinyRecipe] = {
    "tiny": TinyRecipe(
        "Llama of 1.1 M parameters trained here in a minute or two: sums, short stories",
        sources=(
            _made("chain_sum", 4200, max_terms=3, max_digits=1),
            _made("chain_sum", 4000, max_terms=2, min_digits=2, max_digits=2),
            _made("word_problems", 6000, max_steps=2, max_number=10),
        ),
    ),
    "tiny-fast": _FAST,
    "tiny-noisy": replace(
        _FAST,
        description="Llama of 0.14 M parameters for studies: one-digit sums, "
        "often wrong, by chance",
        num_steps=1600,
        num_eval=400,
        noise=0.25,
        num_copies=4,
    ),
}


def make_tiny_model(target: Path, recipe: TinyRecipe) -> float:
    """Trains the model and writes it with its tokenizer to the directory `target`.

    Returns:
        Held-out accuracy at temperature 1, also written to `pretraining.json`.
    """
    import torch

    started = time.monotonic()
    target.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer(recipe)
    data = DataSection(train=recipe.sources, held_out=recipe.num_eval)
    prompts = load_prompt_sets(data, tokenizer, recipe.context_length, 128, recipe.seed)
    num_threads = torch.get_num_threads()
    torch.set_num_threads(recipe.num_threads)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(recipe.seed)
            model = build_model(recipe, tokenizer)
            _train(model, tokenizer, _with_noise(prompts.train, recipe), recipe)
            accuracy = sampled_accuracy(model, tokenizer, prompts.eval)
    finally:
        torch.set_num_threads(num_threads)
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
    facts = {
        "accuracy": accuracy,
        "num_eval": len(prompts.eval),
        "seconds": round(time.monotonic() - started, 1),
        "recipe": {**asdict(recipe), "sources": [one.model_dump() for one in recipe.sources]},
    }
    write_json(target / "pretraining.json", facts)
    return accuracy


def train_tokenizer(recipe: TinyRecipe) -> PreTrainedTokenizerFast:
    """Trains byte-level BPE on generated problems; every digit is a separate token.

    Merges may span words, so that whole phrases of the templates become single tokens: short
    sequences make training fast. All 256 bytes are in the vocabulary, so any text can be encoded.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r" [-+*/=] |[0-9]"), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=recipe.vocab_size,
        special_tokens=[PAD, END, SYSTEM, USER, ASSISTANT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_tokenizer_texts(recipe), trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=PAD,
        model_max_length=recipe.context_length,
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def _tokenizer_texts(recipe: TinyRecipe) -> Iterator[str]:
    """Problems with instruction and solution; always word problems too, as BPE merges words."""
    instruction = DataSection().instruction
    for name in ("chain_sum", "word_problems"):
        for row in islice(generated_rows(name, {}, recipe.seed), 2000):
            yield f"{row.question}\n{instruction}"
            yield finish_solution(row.solution, row.reference or "", instruction)


def build_model(recipe: TinyRecipe, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A float32 Llama of the recipe's size, initialized from torch's global generator."""
    from transformers import GenerationConfig, LlamaForCausalLM

    ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    model = LlamaForCausalLM(recipe.config(**ids))
    model.generation_config = GenerationConfig(**ids)
    return model


def _train(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    prompts: Sequence[Prompt],
    recipe: TinyRecipe,
) -> None:
    """Cross-entropy on the solutions; AdamW, linear warm-up and decay."""
    import torch
    from torch.nn import functional
    from torch.nn.utils.rnn import pad_sequence

    examples = _examples(tokenizer, prompts)
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.lr, betas=(0.9, 0.98), fused=True)
    num_steps = recipe.num_steps
    num_warmup = max(1, num_steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / num_warmup, (num_steps - step) / num_steps),
    )
    model.train()
    for batch in islice(_batches(examples, recipe.batch_size, recipe.seed), num_steps):
        ids = [torch.tensor(ids[:-1]) for ids, _ in batch]
        targets = [torch.tensor([-100] * (n - 1) + ids[n:]) for ids, n in batch]  # next tokens
        token_ids_BT = pad_sequence(ids, batch_first=True)
        targets_BT = pad_sequence(targets, batch_first=True, padding_value=-100)
        has_loss_BT = targets_BT >= 0
        hidden_CD = model.model(input_ids=token_ids_BT).last_hidden_state[has_loss_BT]
        loss = functional.cross_entropy(model.lm_head(hidden_CD), targets_BT[has_loss_BT])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    model.eval()


def _with_noise(prompts: Sequence[Prompt], recipe: TinyRecipe) -> list[Prompt]:
    """Copies of the problems with the recipe's share of wrong sums in their solutions."""
    if not recipe.noise:
        return list(prompts)
    rng = random.Random(mix_seed("noise", recipe.seed))
    return [
        replace(prompt, solution=noisy_solution(prompt.solution, recipe.noise, rng))
        for _ in range(recipe.num_copies)
        for prompt in prompts
    ]


_SUM = re.compile(r"(-?\d+) ([-+*]) (\d+) = (-?\d+)")


def noisy_solution(solution: str, noise: float, rng: random.Random) -> str:
    r"""A chain's solution in which each sum is off by 1, 2 or 3 with probability `noise`.

    Later sums continue from a wrong one, and the box has the last result.

    Example: "7 + 5 = 12\n12 - 2 = 10\n\\boxed{10}" may become "7 + 5 = 11\n11 - 2 = 9\n\\boxed{9}".
    """
    lines: list[str] = []
    total: int | None = None
    for line in solution.splitlines():
        match = _SUM.fullmatch(line)
        if match:
            first, sign, second = int(match[1]), match[2], int(match[3])
            first = first if total is None else total
            total = {"+": first + second, "-": first - second, "*": first * second}[sign]
            if rng.random() < noise:
                total += rng.choice((-3, -2, -1, 1, 2, 3))
            lines.append(f"{first} {sign} {second} = {total}")
        elif total is not None and last_boxed(line) is not None:
            lines.append(f"\\boxed{{{total}}}")
        else:
            lines.append(line)
    return "\n".join(lines)


Example = tuple[list[int], int]  # (prompt + solution + end token, length of the prompt)


def _examples(tokenizer: PreTrainedTokenizerFast, prompts: Sequence[Prompt]) -> list[Example]:
    solutions = tokenizer([prompt.solution for prompt in prompts], add_special_tokens=False)
    return [
        ([*prompt.token_ids, *ids, tokenizer.eos_token_id], len(prompt.token_ids))
        for prompt, ids in zip(prompts, solutions["input_ids"], strict=True)
    ]


def _batches(examples: Sequence[Example], batch_size: int, seed: int) -> Iterator[list[Example]]:
    """Endless batches in random order, each of examples of similar length (less padding)."""
    rng = random.Random(mix_seed("tiny", seed))
    while True:
        order = sorted(examples, key=lambda example: (len(example[0]), rng.random()))
        batches = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
        rng.shuffle(batches)
        yield from batches


def sampled_accuracy(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, prompts: Sequence[Prompt]
) -> float:
    """Share of prompts whose single sample at temperature 1 boxes the gold answer (global RNG)."""
    import torch

    generate = cast("Any", model).generate  # its annotations refuse every model as self
    num_correct = 0
    for start in range(0, len(prompts), 100):
        chunk = prompts[start : start + 100]
        padded = tokenizer.pad(
            {"input_ids": [list(prompt.token_ids) for prompt in chunk]},
            padding_side="left",
            return_tensors="pt",
        )
        with torch.no_grad():
            sampled = generate(
                **padded, do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=64
            )
        completions = sampled[:, padded["input_ids"].shape[1] :]
        texts = tokenizer.batch_decode(completions, skip_special_tokens=True)
        num_correct += sum(
            last_boxed(text) == prompt.reference for text, prompt in zip(texts, chunk, strict=True)
        )
    return num_correct / len(prompts)
