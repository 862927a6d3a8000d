"""Trains the small CLIP tokenizer and text encoder of the bundled model on captioned pictures; run
it again to continue.

    python model/text_encoder.py PICTURES WORK --steps 5000

PICTURES is a folder of RGBA files with ``metadata.jsonl``; WORK receives ``tokenizer/`` at once,
checkpoints, and at the end ``text_encoder/``, both in the transformers layout. The text encoder
learns what the captioned picture looks like: each of the last 16 hidden states, which see the whole
caption and which the UNet will attend to, predicts one of the 4x4 patches of the picture at 32x32
through one shared linear readout, and the state at the end of the text predicts the picture at
16x16 through a small MLP. Both readouts are used in training only. The empty caption stands for the
mean picture.
"""

import argparse
import functools
import json
import math
import re
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from tokenizers import Tokenizer, models, trainers
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from limner import rng
from limner.storage import atomic, checkpoint
from limner.storage.atomic import MANIFEST

LENGTH = 32
VOCABULARY = 2048
SAVE_EVERY = 500
CONFIG = {
    "hidden_size": 160,
    "projection_dim": 160,
    "intermediate_size": 480,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": LENGTH,
}
START, END = "<|startoftext|>", "<|endoftext|>"
SIDE, PATCHES = 32, 16
PREFIX = "an emoji of "
WORDS = """
a an the of in on with and or at by from to for photo picture drawing painting sketch image icon
sign style art emoji blueprint line pixel red orange yellow green blue purple pink brown black
white gray grey gold golden silver cyan teal dark light bright pale big small large little tiny
tall short wide thin thick long round square flat open closed old new left right up down top
bottom middle center corner tilted two three four five six apple house star heart sun moon tree
car clock cup fish key letter umbrella flower boat balloon book bell lamp chair table door window
bottle glass bird cat dog horse cow pig bear rabbit mouse duck butterfly leaf cloud rain snow
mountain river sea road bridge castle tower tent train bus truck bicycle plane rocket ship anchor
hat shoe shirt dress bag ring crown hammer saw screw knife fork spoon plate bowl teapot pan cake
bread cheese egg pear banana cherry lemon grape carrot mushroom pumpkin candle lantern flag drum
guitar piano phone camera computer robot ball kite gift box basket pencil pen brush scissors
ladder wheel gear magnet circle triangle rectangle diamond arrow cross line dot stripe chimney
handle sail wing eye face
""".split()  # noqa: SIM905


def read(folder: Path) -> tuple[np.ndarray, list[str]]:
    """All pictures on white, as [pictures, 3, 32, 32] in 0 to 1, and the names in their
    captions."""
    entries = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    pictures = []
    for entry in entries:
        rgba = Image.open(folder / entry["file_name"]).convert("RGBA")
        white = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
        pictures.append(
            np.asarray(white.resize((SIDE, SIDE), Image.Resampling.BOX), np.float32).transpose(
                2, 0, 1
            )
            / 255
        )
    return np.stack(pictures), [entry["text"].removeprefix(PREFIX) for entry in entries]


def learn_tokenizer(names: list[str], folder: Path) -> CLIPTokenizer:
    """A byte-level BPE with CLIP's normalisation, in CLIP's order of entries: bytes, bytes that end
    a word, merges, start, end."""
    symbols = bytes_to_unicode()
    entries = symbols + [s + "</w>" for s in symbols]
    clip = CLIPTokenizer().backend_tokenizer
    learner = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    learner.normalizer, learner.pre_tokenizer = clip.normalizer, clip.pre_tokenizer
    # Symbols that it meets by itself are numbered in the order of a hash table, which decides ties:
    # naming them all first makes it repeatable.
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=entries,
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    learner.train_from_iterator(names + WORDS * 20, trainer)
    merges = [tuple(m) for m in json.loads(learner.to_str())["model"]["merges"]][
        : VOCABULARY - len(entries) - 2
    ]
    entries = list(dict.fromkeys(entries + ["".join(m) for m in merges] + [START, END]))
    with atomic.write_folder(folder) as path:
        tokenizer = CLIPTokenizer(
            vocab={e: i for i, e in enumerate(entries)}, merges=merges, model_max_length=LENGTH
        )
        tokenizer.save_pretrained(path)
        (path / "vocab.json").write_text(
            json.dumps({e: i for i, e in enumerate(entries)}, ensure_ascii=False)
        )
        (path / "merges.txt").write_text(
            "#version: 0.2\n" + "".join(f"{left} {right}\n" for left, right in merges)
        )
    (folder / MANIFEST).unlink()
    return CLIPTokenizer.from_pretrained(folder)


def bytes_to_unicode() -> list[str]:
    """The printable character that stands for each byte in GPT-2's and CLIP's vocabularies, in
    their order."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return [chr(b) for b in printable] + [chr(256 + i) for i in range(256 - len(printable))]


def wording(name: str, g: np.random.Generator) -> str:
    """One of the ways a user may write a caption: with or without prefix, article, typographic
    marks; now and then without one of its words, or empty."""
    if g.random() < 0.03:
        return ""
    words = name.split()
    if len(words) > 1 and g.random() < 0.1:
        del words[g.integers(len(words))]
    name = " ".join(words)
    if g.random() < 0.3:
        name = name.replace("\u2019", "'").replace("-", " ")
    article = g.choice(
        ["", "an " if re.match("[aeiou]", name, re.IGNORECASE) else "a ", "the "], p=[0.5, 0.4, 0.1]
    )
    return (
        g.choice([PREFIX, "emoji of ", "", "a picture of "], p=[0.7, 0.08, 0.17, 0.05])
        + article
        + name
    )


@functools.lru_cache(1)
def order(epoch: int, count: int) -> np.ndarray:
    """In which order an epoch goes through the pictures."""
    return rng.at(0, "text order", epoch).permutation(count)


class Painter(nn.Module):
    """The text encoder and the two readouts it is trained through."""

    def __init__(self, tokenizer: CLIPTokenizer) -> None:
        super().__init__()
        ids = {
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        }
        self.encoder = CLIPTextModel(CLIPTextConfig(**CONFIG, **ids, vocab_size=len(tokenizer)))
        width, self.edge = CONFIG["hidden_size"], SIDE // 4
        self.patch = nn.Linear(width, 3 * self.edge**2)
        self.whole = nn.Sequential(nn.Linear(width, 256), nn.GELU(), nn.Linear(256, 3 * 16 * 16))

    def forward(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Deviations from the mean picture: at 32x32 from the last 16 states, at 16x16 from the
        pooled state."""
        out = self.encoder(ids)
        patches = self.patch(out.last_hidden_state[:, -PATCHES:]).view(
            -1, 4, 4, 3, self.edge, self.edge
        )
        return patches.permute(0, 3, 1, 4, 2, 5).reshape(-1, 3, SIDE, SIDE), self.whole(
            out.pooler_output
        ).view(-1, 3, 16, 16)


def tokens(tokenizer: CLIPTokenizer, captions: list[str]) -> torch.Tensor:
    """Token numbers, padded to the full length as a Stable Diffusion pipeline pads them."""
    return tokenizer(
        captions, padding="max_length", truncation=True, max_length=LENGTH, return_tensors="pt"
    ).input_ids


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("pictures", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rate", type=float, default=2e-3)
    a = parser.parse_args()
    pictures, names = read(a.pictures)
    known = a.work / "tokenizer"
    tokenizer = (
        CLIPTokenizer.from_pretrained(known) if known.is_dir() else learn_tokenizer(names, known)
    )
    torch.manual_seed(0)
    painter = Painter(tokenizer)
    print(f"{len(tokenizer)} tokens, {painter.encoder.num_parameters()} parameters", flush=True)
    target = torch.from_numpy(pictures - pictures.mean(0))
    keys, params = zip(*painter.named_parameters(), strict=True)
    groups = [
        {"params": [p for p in params if (p.ndim > 1) == decayed], "weight_decay": 0.03 * decayed}
        for decayed in (True, False)
    ]
    optimizer = torch.optim.AdamW(groups, lr=a.rate, betas=(0.9, 0.98), fused=True)
    first = 0
    if (found := checkpoint.find_latest(a.work)) is not None:
        first = found.step
        weights, moments = found.arrays("model.safetensors"), found.arrays("optimizer.safetensors")
        for key, p in zip(keys, params, strict=True):
            p.data.copy_(torch.tensor(weights[key]))
            optimizer.state[p] = {
                k: torch.tensor(moments[f"{k}/{key}"]) for k in ("step", "exp_avg", "exp_avg_sq")
            }
    began, mean = time.monotonic(), 0.0
    for step in range(first, a.steps):
        chosen, captions = [], []
        for position in range(step * a.batch, (step + 1) * a.batch):
            epoch, place = divmod(position, len(names))
            chosen.append(order(epoch, len(names))[place])
            captions.append(wording(names[chosen[-1]], rng.at(0, "wording", position)))
        x = target[chosen] * torch.tensor([bool(c) for c in captions])[:, None, None, None]
        for group in optimizer.param_groups:
            group["lr"] = (
                a.rate * min(1, (step + 1) / 200) * 0.5 * (1 + math.cos(math.pi * step / a.steps))
            )
        fine, coarse = painter(tokens(tokenizer, captions))
        loss = F.mse_loss(fine, x) + 0.5 * F.mse_loss(coarse, F.avg_pool2d(x, 2))
        loss.backward()
        nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        mean = loss.item() if step == first else mean + 0.02 * (loss.item() - mean)
        if (step + 1) % 100 == 0:
            print(
                f"step {step + 1}: loss {mean:.4f} "
                f"({(step + 1 - first) / (time.monotonic() - began):.1f} steps/s)",
                flush=True,
            )
        if (step + 1) % SAVE_EVERY == 0 or step + 1 == a.steps:
            moments = {
                f"{k}/{n}": np.asarray(optimizer.state[p][k])
                for n, p in zip(keys, params, strict=True)
                for k in ("step", "exp_avg", "exp_avg_sq")
            }
            weights = {n: p.detach().numpy() for n, p in zip(keys, params, strict=True)}
            checkpoint.save(
                a.work,
                step + 1,
                [("model.safetensors", weights, {}), ("optimizer.safetensors", moments, {})],
                {},
                keep=2,
            )
    painter.encoder.save_pretrained(a.work / "text_encoder")
    report(painter.eval(), tokenizer, target, names)


@torch.no_grad()
def report(
    painter: Painter, tokenizer: CLIPTokenizer, target: torch.Tensor, names: list[str]
) -> None:
    """How well the picture is predicted from its caption: explained variance, and how often it is
    the nearest of all pictures at 16x16."""
    truth = F.avg_pool2d(target, 2).flatten(1)
    for label, form in (
        ("as captioned", PREFIX + "{}"),
        ("with article", PREFIX + "a {}"),
        ("name alone", "{}"),
    ):
        fine = torch.cat(
            [
                painter(part)[0]
                for part in tokens(tokenizer, [form.format(n) for n in names]).split(64)
            ]
        )
        explained = 1 - (fine - target).square().mean() / target.square().mean()
        distance = torch.cdist(F.avg_pool2d(fine, 2).flatten(1), truth)
        rank = (distance < distance.diagonal()[:, None]).sum(1)
        first, five = ((rank < k).float().mean() for k in (1, 5))
        print(
            f"{label}: explained variance {explained:.4f}, nearest {first:.4f}, among the 5 "
            f"nearest {five:.4f} of {len(names)}"
        )


if __name__ == "__main__":
    main()
