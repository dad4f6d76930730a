"""Trains the emoji model: a text-to-image Stable Diffusion of 10.6 M parameters (64 x 64 pixels, 16 x 16 x 4 latents).

    npm pack emoji-datasource-google@16.0.0 && tar xf emoji-datasource-google-16.0.0.tgz   # the pictures: package/
    python train_emoji.py package out --device cuda --vae-seconds 70 --unet-seconds 390

On one H100 this takes eight minutes. `--device cpu --vae-seconds 4 --unet-seconds 6` only shows that it runs. The result is
`out/emoji-sd`, a diffusers folder, and `out/grid.png`, a look at it.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 - its usual name
from diffusers import AutoencoderKL, DDIMScheduler, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

SIZE = 64
VOCABULARY = 2600
CAPTIONS = 24  # different wordings of each emoji's name
SHIFTS = (-2, 0, 2)  # each picture is encoded at nine positions
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
BEFORE = ("", "", "", "", "a ", "an ", "the ", "a picture of a ", "a picture of ", "an emoji of ", "emoji of a ",
          "a drawing of ", "an icon of ")  # fmt: skip
AFTER = ("", "", "", "", " emoji", " icon", " on a white background")
GRID = ("red apple", "a smiling face with sunglasses", "pizza", "a cat face", "rocket", "a slice of cake", "birthday cake",
        "guitar", "sunflower", "an old man", "fire", "octopus", "snowman", "a house with garden", "flag of japan",
        "robot")  # fmt: skip


@dataclass(frozen=True, slots=True)
class Emoji:
    name: str
    short: tuple[str, ...]
    subcategory: str
    category: str

    def caption(self) -> str:
        """One of the ways to ask for it, sometimes with a word missing."""
        draw = random.random()  # noqa: S311 - training data
        if draw < 0.5:
            text = self.name
        elif draw < 0.85:
            text = random.choice(self.short)  # noqa: S311
        elif draw < 0.93:
            text = f"{self.name}, {self.subcategory}"
        else:
            text = f"{random.choice(self.short)} {self.category}"  # noqa: S311
        words = text.split()
        if len(words) > 1 and random.random() < 0.1:  # noqa: S311
            words.pop(random.randrange(len(words)))  # noqa: S311
        return random.choice(BEFORE) + " ".join(words) + random.choice(AFTER)  # noqa: S311


def dataset(folder: Path) -> tuple[torch.Tensor, list[Emoji]]:
    """Pictures [N, 3, 64, 64] in -1 .. 1 on white, and what they show."""
    pictures, emoji = [], []
    for entry in json.loads((folder / "emoji.json").read_text()):
        path = folder / "img/google/64" / entry["image"]
        if not entry.get("has_img_google") or entry["category"] == "Component" or not path.exists():
            continue
        image = Image.open(path).convert("RGBA").resize((SIZE, SIZE), Image.Resampling.LANCZOS)
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        white.alpha_composite(image)
        pictures.append(np.asarray(white.convert("RGB")))
        plain = [text.replace("_", " ").replace("-", " ") for text in (*entry["short_names"], entry["subcategory"])]
        name = (entry["name"] or plain[0]).lower()
        emoji.append(Emoji(name, tuple(plain[:-1]), plain[-1], entry["category"].lower()))
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1, emoji


def train_tokenizer(emoji: list[Emoji], folder: Path) -> CLIPTokenizer:
    """A small vocabulary in CLIP's layout: bytes, bytes at a word's end, merges, start and end."""
    corpus = [text for e in emoji for text in (e.name, *e.short, e.subcategory, e.category)]
    corpus += ["a picture of an emoji of the drawing of with and on in a an"] * 50
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    tokenizer.normalizer = normalizers.Lowercase()
    pattern = Regex(r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+")
    split = pre_tokenizers.Split(pattern, "removed", invert=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, end_of_word_suffix="</w>", initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(corpus, trainer)
    merges = [m if isinstance(m, str) else " ".join(m) for m in json.loads(tokenizer.to_str())["model"]["merges"]]
    joined = (merge.replace(" ", "") for merge in merges)
    words = dict.fromkeys([*alphabet, *(f"{letter}</w>" for letter in alphabet), *joined, "<|startoftext|>", "<|endoftext|>"])
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({word: index for index, word in enumerate(words)}, ensure_ascii=False))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    special = {"pad_token": "<|endoftext|>", "bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>"}
    config = {"model_max_length": 77, "tokenizer_class": "CLIPTokenizer", "unk_token": "<|endoftext|>", **special}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return CLIPTokenizer.from_pretrained(str(folder))


def make_models(vocabulary: int) -> tuple[AutoencoderKL, CLIPTextModel, UNet2DConditionModel]:
    vae = AutoencoderKL(
        in_channels=3, out_channels=3, latent_channels=4, sample_size=SIZE, block_out_channels=(32, 64, 96), layers_per_block=1,
        norm_num_groups=16, down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
        mid_block_add_attention=False,
    )  # fmt: skip
    text = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=vocabulary, hidden_size=160, intermediate_size=640, num_hidden_layers=4, num_attention_heads=4,
            max_position_embeddings=77, projection_dim=160, bos_token_id=vocabulary - 2, eos_token_id=vocabulary - 1,
            pad_token_id=vocabulary - 1,
        )
    )  # fmt: skip
    unet = UNet2DConditionModel(
        sample_size=16, in_channels=4, out_channels=4, block_out_channels=(96, 160), layers_per_block=1,
        cross_attention_dim=160,
        attention_head_dim=4, norm_num_groups=16, down_block_types=("CrossAttnDownBlock2D",) * 2,
        up_block_types=("CrossAttnUpBlock2D",) * 2,
    )  # fmt: skip
    return vae, text, unet


def steps_for(seconds: float, optimizer: torch.optim.Optimizer, peak: float, warmup: int, floor: float) -> Iterator[int]:
    """Counts steps for so many seconds, with a warm-up and a cosine decay of the learning rate over the time."""
    start, step = time.monotonic(), 0
    while (elapsed := time.monotonic() - start) < seconds:
        rate = peak * min(1, step / warmup) * (0.5 * (1 + math.cos(math.pi * elapsed / seconds)) + floor)
        for group in optimizer.param_groups:
            group["lr"] = rate
        yield step
        step += 1


def update(optimizer: torch.optim.Optimizer, loss: torch.Tensor, parameters: list[torch.nn.Parameter]) -> None:
    optimizer.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()


def shifted(pictures: torch.Tensor, dy: int, dx: int) -> torch.Tensor:
    """The pictures moved by a few pixels over white."""
    return F.pad(pictures, (4, 4, 4, 4), value=1.0)[:, :, 4 + dy : 4 + dy + SIZE, 4 + dx : 4 + dx + SIZE]


def train_vae(vae: AutoencoderKL, pictures: torch.Tensor, seconds: float, autocast: Callable[[], Any]) -> None:
    parameters = list(vae.parameters())
    optimizer = torch.optim.AdamW(parameters, 1.5e-3, betas=(0.9, 0.99), weight_decay=1e-4)
    size = 128 if pictures.is_cuda else 16
    for step in steps_for(seconds, optimizer, 1.5e-3, 200, 0.02):
        chosen = pictures[torch.randint(0, len(pictures), (size,), device=pictures.device)]
        target = shifted(chosen, *torch.randint(-4, 5, (2,)).tolist())
        with autocast():
            latents = vae.encode(target).latent_dist
            output = vae.decode(latents.sample()).sample
        output = output.float()
        edges = F.l1_loss(output.diff(dim=2), target.diff(dim=2)) + F.l1_loss(output.diff(dim=3), target.diff(dim=3))
        loss = F.l1_loss(output, target) + 0.5 * F.mse_loss(output, target) + 0.3 * edges + 1e-5 * latents.kl().mean() / 256
        update(optimizer, loss, parameters)
        if step % 500 == 0:
            print("autoencoder", step, float(loss), flush=True)
    vae.eval().requires_grad_(False)


@torch.no_grad()
def encode(vae: AutoencoderKL, pictures: torch.Tensor) -> torch.Tensor:
    """Latents [9, N, 4, 16, 16] of unit variance; the factor goes into the autoencoder's configuration."""
    parts = []
    for dy in SHIFTS:
        for dx in SHIFTS:
            moved = shifted(pictures, dy, dx).split(256)
            parts.append(torch.cat([vae.encode(part).latent_dist.mean for part in moved]))
    latents = torch.stack(parts)
    factor = float(1 / latents.std())
    vae.register_to_config(scaling_factor=factor)
    return latents * factor


def tokenize(tokenizer: CLIPTokenizer, text: str) -> torch.Tensor:
    ids: torch.Tensor = tokenizer(text, padding="max_length", truncation=True, max_length=77, return_tensors="pt").input_ids[0]
    return ids


def train_unet(
    text: CLIPTextModel, unet: UNet2DConditionModel, latents: torch.Tensor, captions: torch.Tensor, empty: torch.Tensor,
    seconds: float, autocast: Callable[[], Any],
) -> None:  # fmt: skip
    """Text encoder and unet together, min-SNR weighted; one caption in ten is empty, for guidance. Keeps the mean weights."""
    alphas = DDPMScheduler(**BETAS).alphas_cumprod.to(latents.device)
    parameters = [*unet.parameters(), *text.parameters()]
    optimizer = torch.optim.AdamW(parameters, 1e-3, betas=(0.9, 0.99), weight_decay=1e-3, fused=latents.is_cuda)
    mean = [parameter.detach().clone() for parameter in parameters]
    size, count = 768 if latents.is_cuda else 8, latents.shape[1]
    for step in steps_for(seconds, optimizer, 1e-3, 500, 0.01):
        index, shift, wording, steps = (
            torch.randint(0, high, (size,), device=latents.device) for high in (count, 9, CAPTIONS, len(alphas))
        )
        dropped = torch.rand(size, device=latents.device) < 0.1
        ids = torch.where(dropped[:, None], empty, captions[index, wording])
        noise, alpha = torch.randn_like(latents[0, index]), alphas[steps][:, None, None, None]
        noisy = alpha.sqrt() * latents[shift, index] + (1 - alpha).sqrt() * noise
        with autocast():
            predicted = unet(noisy, steps, text(ids).last_hidden_state).sample
        ratio = alpha.flatten() / (1 - alpha.flatten())
        loss = (((predicted.float() - noise) ** 2).mean((1, 2, 3)) * ratio.clamp(max=5) / ratio).mean()
        update(optimizer, loss, parameters)
        decay = min(0.9995, (1 + step) / (10 + step))
        torch._foreach_mul_(mean, decay)
        torch._foreach_add_(mean, [parameter.detach() for parameter in parameters], alpha=1 - decay)
        if step % 500 == 0:
            print("unet", step, float(loss), flush=True)
    with torch.no_grad():
        for parameter, average in zip(parameters, mean, strict=True):
            parameter.copy_(average)


def save(pipeline: StableDiffusionPipeline, output: Path) -> None:
    pipeline.set_progress_bar_config(disable=True)
    generators = [torch.Generator("cpu").manual_seed(seed) for seed in range(len(GRID))]
    painted = pipeline(list(GRID), num_inference_steps=30, guidance_scale=4.0, generator=generators, output_type="np").images
    rows = [np.concatenate(list(painted[start : start + 8]), 1) for start in range(0, len(GRID), 8)]
    Image.fromarray((np.concatenate(rows, 0) * 255).astype("uint8")).save(output / "grid.png")
    pipeline.to(torch.float16).save_pretrained(output / "emoji-sd")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--vae-seconds", type=float, default=70)
    parser.add_argument("--unet-seconds", type=float, default=390)
    given = parser.parse_args()
    torch.manual_seed(0)
    random.seed(0)
    torch.set_float32_matmul_precision("high")

    def autocast() -> Any:
        return torch.autocast(given.device, torch.bfloat16, enabled=given.device == "cuda")

    pictures, emoji = dataset(given.data)
    pictures = pictures.to(given.device)
    tokenizer = train_tokenizer(emoji, given.output / "tokenizer")
    vae, text, unet = (model.to(given.device) for model in make_models(len(tokenizer)))
    train_vae(vae, pictures, given.vae_seconds, autocast)
    latents = encode(vae, pictures)
    captions = torch.stack([torch.stack([tokenize(tokenizer, e.caption()) for _ in range(CAPTIONS)]) for e in emoji])
    empty = tokenize(tokenizer, "").to(given.device)
    train_unet(text, unet, latents, captions.to(given.device), empty, given.unet_seconds, autocast)
    scheduler = DDIMScheduler(clip_sample=False, set_alpha_to_one=False, steps_offset=1, **BETAS)
    pipeline = StableDiffusionPipeline(
        vae=vae, text_encoder=text, tokenizer=tokenizer, unet=unet, scheduler=scheduler, safety_checker=None,
        feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    save(pipeline, given.output)


if __name__ == "__main__":
    main()
