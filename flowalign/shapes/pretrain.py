"""Trains the embedded pipeline from nothing: `python -m flowalign.shapes.pretrain` (`make pretrain`).

`torchrun --nproc-per-node 2 -m flowalign.shapes.pretrain` shares each batch between processes of one thread, which on a
busy machine is far quicker than two threads that wait for each other at every operation.

Four phases, each leaving its result in the run folder and skipped where it is already there; the transformer phase
also resumes from its own last checkpoint. The result is an ordinary diffusers folder.
"""

from __future__ import annotations

import logging
import os
import time
from pathlib import Path

import hydra
import numpy as np
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from omegaconf import DictConfig
from torch import Tensor, distributed, nn
from torch.utils.tensorboard import SummaryWriter
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

from flowalign.shapes import tokenizer
from flowalign.shapes.render import picture
from flowalign.shapes.verify import verify
from flowalign.shapes.world import KINDS, Spec, specs

log = logging.getLogger("flowalign.pretrain")
CONF = str(next(p for p in (Path(__file__).parents[1] / "conf", Path(__file__).parents[2] / "conf") if p.is_dir()))


# ---------------------------------------------------------------- data


def draw_specs(number: int, mix: dict[str, float], seed: int) -> list[Spec]:
    """`number` specifications with the given share of each kind."""
    rng = np.random.default_rng(seed)
    pools = {kind: specs(kind) for kind in KINDS}
    kinds = rng.choice(KINDS, size=number, p=np.array([mix[k] for k in KINDS]) / sum(mix.values()))
    return [pools[kind][rng.integers(len(pools[kind]))] for kind in kinds]


def pictures(chosen: list[Spec], first_seed: int, size: int) -> Tensor:
    """(B, 3, size, size) in [0, 1]."""
    images = np.stack([picture(spec, first_seed + i, size) for i, spec in enumerate(chosen)])
    return torch.from_numpy(images).permute(0, 3, 1, 2)


class Captions:
    """Token ids of every wording of every specification, so that a step only indexes."""

    def __init__(self) -> None:
        self.rows: dict[Spec, list[int]] = {}
        texts = [""]
        for kind in KINDS:
            for spec in specs(kind):
                wordings = spec.captions()
                self.rows[spec] = list(range(len(texts), len(texts) + len(wordings)))
                texts += wordings
        encoded = tokenizer.build()(texts, padding="max_length", max_length=tokenizer.MAX_LENGTH, truncation=True)
        self.ids = torch.tensor(encoded["input_ids"])

    def draw(self, chosen: list[Spec], dropout: float, rng: np.random.Generator) -> Tensor:
        rows = [0 if rng.random() < dropout else rng.choice(self.rows[spec]) for spec in chosen]
        return self.ids[torch.tensor(rows)]


# ---------------------------------------------------------------- networks


def new_vae(cfg: DictConfig) -> AutoencoderKL:
    blocks = len(cfg.vae.channels)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * blocks,
        up_block_types=("UpDecoderBlock2D",) * blocks,
        block_out_channels=tuple(cfg.vae.channels),
        layers_per_block=cfg.vae.layers,
        latent_channels=cfg.latent_channels,
        norm_num_groups=8,
        sample_size=64,
        mid_block_add_attention=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def new_transformer(cfg: DictConfig) -> SD3Transformer2DModel:
    t = cfg.transformer
    width = t.heads * t.head_dim
    return SD3Transformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=cfg.latent_channels,
        out_channels=cfg.latent_channels,
        num_layers=t.layers,
        attention_head_dim=t.head_dim,
        num_attention_heads=t.heads,
        caption_projection_dim=width,
        joint_attention_dim=2 * cfg.text.width,
        pooled_projection_dim=2 * cfg.text.width,
        pos_embed_max_size=32,
        qk_norm="rms_norm",
    )


def new_text_encoder(cfg: DictConfig) -> CLIPTextModelWithProjection:
    tok = tokenizer.build()
    return CLIPTextModelWithProjection(
        CLIPTextConfig(
            vocab_size=len(tok),
            hidden_size=cfg.text.width,
            intermediate_size=4 * cfg.text.width,
            projection_dim=cfg.text.width,
            num_hidden_layers=cfg.text.layers,
            num_attention_heads=cfg.text.heads,
            max_position_embeddings=tokenizer.MAX_LENGTH,
            bos_token_id=tok.bos_token_id,
            eos_token_id=tok.eos_token_id,
            pad_token_id=tok.pad_token_id,
        )
    )


class Generator(nn.Module):
    """Transformer and both text encoders as one trained thing; the text path is the pipeline's own, with one empty T5 token."""

    def __init__(self, cfg: DictConfig) -> None:
        super().__init__()
        self.transformer = new_transformer(cfg)
        self.text_encoder = new_text_encoder(cfg)
        self.text_encoder_2 = new_text_encoder(cfg)
        nn.init.zeros_(self.transformer.proj_out.weight)
        nn.init.zeros_(self.transformer.proj_out.bias)
        for block in self.transformer.transformer_blocks:  # adaLN-zero, which diffusers leaves at its default initialisation
            for norm in (block.norm1, block.norm1_context):
                nn.init.zeros_(norm.linear.weight)
                nn.init.zeros_(norm.linear.bias)
        nn.init.normal_(self.transformer.pos_embed.proj.bias, std=0.02)

    def encode(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        outs = [encoder(ids, output_hidden_states=True) for encoder in (self.text_encoder, self.text_encoder_2)]
        tokens = torch.cat([out.hidden_states[-2] for out in outs], dim=-1)
        empty_t5 = tokens.new_zeros(len(ids), 1, tokens.shape[-1])
        return torch.cat([tokens, empty_t5], dim=1), torch.cat([out.text_embeds for out in outs], dim=-1)

    def forward(self, x: Tensor, t: Tensor, ids: Tensor) -> Tensor:
        tokens, pooled = self.encode(ids)
        return self.transformer(
            hidden_states=x, timestep=1000 * t, encoder_hidden_states=tokens, pooled_projections=pooled, return_dict=False
        )[0]


# ---------------------------------------------------------------- phases


def train_vae(cfg: DictConfig, folder: Path, board: SummaryWriter) -> AutoencoderKL:
    """Phase 1. Mean squared and absolute error plus a little KL; latents are normalised per set, as SD3's are."""
    if (folder / "vae").is_dir():
        return AutoencoderKL.from_pretrained(folder / "vae").eval()
    torch.manual_seed(cfg.seed)
    vae = new_vae(cfg).to(memory_format=torch.channels_last)
    steps, batch = cfg.vae.steps, cfg.vae.batch
    optimiser = torch.optim.AdamW(vae.parameters(), lr=cfg.vae.lr, weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, cfg.vae.lr, total_steps=steps, pct_start=0.05)
    started = time.time()
    for step in range(steps):
        large = step % 12 == 11
        chosen = draw_specs(batch // 4 if large else batch, cfg.mix, seed=step)
        images = pictures(chosen, step * batch, 128 if large else 64).contiguous(memory_format=torch.channels_last)
        posterior = vae.encode(2 * images - 1).latent_dist
        error = vae.decode(posterior.sample()).sample - (2 * images - 1)
        loss = error.square().mean() + 0.1 * error.abs().mean() + cfg.vae.kl * posterior.kl().mean() / posterior.mean[0].numel()
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        if step % 50 == 0:
            board.add_scalar("vae/mse", error.square().mean(), step)
            log.info("vae step %d of %d: mse %.5f, %.0f s", step, steps, error.square().mean(), time.time() - started)
    vae.eval()
    with torch.no_grad():
        z = vae.encode(2 * pictures(draw_specs(512, cfg.mix, 7), 0, 64) - 1).latent_dist.mean
    vae.register_to_config(scaling_factor=float(1 / z.std()), shift_factor=float(z.mean()))
    vae.save_pretrained(folder / "vae")
    chosen = draw_specs(512, cfg.mix, 11)
    with torch.no_grad():
        back = vae.decode(vae.encode(2 * pictures(chosen, 10**6, 64) - 1).latent_dist.mean).sample
    strict = np.mean([verify(im, s)[0] for im, s in zip(to_numpy(back), chosen, strict=True)])
    log.info("vae: %.1f %% strict after a round trip, %.0f s", 100 * strict, time.time() - started)
    board.add_scalar("vae/strict", strict, steps)
    return vae


def to_numpy(decoded: Tensor) -> np.ndarray:
    return (decoded / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).float().numpy()


@torch.no_grad()
def cache_latents(cfg: DictConfig, folder: Path, vae: AutoencoderKL, size: int, number: int, seed: int) -> np.ndarray:
    """Phase 2. (number, C, size/4, size/4) float16 on disk, normalised; scene i has seed `seed + i`."""
    path = folder / f"latents_{size}.npy"
    if path.exists():
        return np.load(path, mmap_mode="r")
    chosen = draw_specs(number, cfg.mix, seed)
    out = np.empty((number, cfg.latent_channels, size // 4, size // 4), dtype=np.float16)
    chunk = 64 * 64 * 256 // size**2
    for start in range(0, number, chunk):
        images = pictures(chosen[start : start + chunk], seed + start, size)
        z = vae.encode(2 * images.contiguous(memory_format=torch.channels_last) - 1).latent_dist.mean
        out[start : start + chunk] = ((z - vae.config.shift_factor) * vae.config.scaling_factor).half().numpy()
    partial = path.with_suffix(".tmp.npy")
    np.save(partial, out)
    os.replace(partial, path)
    return out


def optimisers(cfg: DictConfig, model: Generator) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the blocks, AdamW for everything else."""
    matrices = [p for p in model.transformer.transformer_blocks.parameters() if p.ndim == 2]
    known = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in known]
    muon = torch.optim.Muon(matrices, lr=cfg.train.muon_lr, weight_decay=0.01, adjust_lr_fn="match_rms_adamw")
    return [muon, torch.optim.AdamW(others, lr=cfg.train.adam_lr, betas=(0.9, 0.98), weight_decay=0.01, fused=True)]


def rank_and_world() -> tuple[int, int]:
    return (distributed.get_rank(), distributed.get_world_size()) if distributed.is_initialized() else (0, 1)


def average_gradients(model: nn.Module) -> None:
    """The mean over processes; nothing to do for one."""
    if distributed.is_initialized():
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        flat = torch.cat([g.flatten() for g in grads])
        distributed.all_reduce(flat)
        for grad, mean in zip(grads, (flat / distributed.get_world_size()).split([g.numel() for g in grads]), strict=True):
            grad.copy_(mean.view_as(grad))


def pace(step: int, cfg: DictConfig) -> float:
    """Warm-up, plateau, linear decay to zero over the last part: the plateau can be prolonged on resume."""
    decay = cfg.train.decay_share * cfg.train.steps
    return min((step + 1) / cfg.train.warmup, 1.0, max(cfg.train.steps - step, 0) / decay)


@torch.no_grad()
def evaluate(cfg: DictConfig, model: Generator, vae: AutoencoderKL, number: int, size: int = 64, guidance: float = 1.0) -> dict[str, float]:
    """Strict share by kind on test prompts, Euler with the pipeline's own schedule."""
    shares = {}
    captions = Captions()
    for kind in KINDS:
        pool = [s for s in specs(kind) if s.split == "test"]
        chosen = [pool[i * 7919 % len(pool)] for i in range(number // 4)]
        scheduler = FlowMatchEulerDiscreteScheduler(shift=cfg.shift)
        scheduler.set_timesteps(cfg.train.eval_steps)
        sigmas = scheduler.sigmas
        x = torch.randn(len(chosen), cfg.latent_channels, size // 4, size // 4, generator=torch.Generator().manual_seed(1))
        ids = captions.draw(chosen, 0.0, np.random.default_rng(3))
        for s, s_next in zip(sigmas[:-1], sigmas[1:], strict=True):
            v = model(x, s.expand(len(x)), ids)
            if guidance != 1.0:
                empty = model(x, s.expand(len(x)), captions.ids[:1].expand(len(x), -1))
                v = empty + guidance * (v - empty)
            x = x + (s_next - s) * v
        images = to_numpy(vae.decode(x / vae.config.scaling_factor + vae.config.shift_factor).sample)
        shares[kind] = float(np.mean([verify(im, s)[0] for im, s in zip(images, chosen, strict=True)]))
    return {"strict": float(np.mean(list(shares.values()))), **shares}


def train_generator(cfg: DictConfig, folder: Path, board: SummaryWriter, vae: AutoencoderKL) -> Generator:
    """Phase 3. Flow matching on cached latents, mostly at 64 pixels, with caption dropout; weights are an average."""
    torch.manual_seed(cfg.seed)
    model, averaged = Generator(cfg), Generator(cfg)
    averaged.load_state_dict(model.state_dict())
    averaged.requires_grad_(False)
    opts = optimisers(cfg, model)
    start, path = 0, folder / "generator.ckpt"
    if path.exists():
        state = torch.load(path, weights_only=True)
        model.load_state_dict(state["model"])
        averaged.load_state_dict(state["averaged"])
        for opt, s in zip(opts, state["optimisers"], strict=True):
            opt.load_state_dict(s)
        start = state["step"]
        log.info("resumed at step %d", start)
    data = {
        size: (cache_latents(cfg, folder, vae, size, n, seed), draw_specs(n, cfg.mix, seed))
        for size, n, seed in ((64, cfg.data.number_64, 10**7), (128, cfg.data.number_128, 2 * 10**7))
    }
    if cfg.train.compile:
        for block in model.transformer.transformer_blocks:
            block.compile(dynamic=False)
    captions, base_lr = Captions(), [cfg.train.muon_lr, cfg.train.adam_lr]
    rank, world = rank_and_world()
    began, sum_loss, seen = time.time(), 0.0, 0
    for step in range(start, cfg.train.steps):
        rng = np.random.default_rng([cfg.seed, step, rank])
        noise = torch.Generator().manual_seed(int(rng.integers(2**62)))
        size = 128 if step % cfg.data.every_128 == cfg.data.every_128 - 1 else 64
        latents, scenes = data[size]
        batch = cfg.train.batch // world // (4 if size == 128 else 1)
        rows = np.sort(rng.integers(len(latents), size=batch))
        x0 = torch.from_numpy(latents[rows].astype(np.float32))
        ids = captions.draw([scenes[r] for r in rows], cfg.train.caption_dropout, rng)
        # Logit-normal times (SD3), centred a little towards noise, where the layout is decided.
        t = torch.sigmoid(cfg.train.time_mean + cfg.train.time_std * torch.randn(batch, generator=noise))
        eps = torch.randn(x0.shape, generator=noise)
        weight = t.view(-1, 1, 1, 1)
        noisy, target = (1 - weight) * x0 + weight * eps, eps - x0
        v = model(noisy, t, ids)
        if step >= cfg.train.guide_from:
            # Model guidance (arXiv:2502.12154): the network learns its own guided velocity, so that one call is enough;
            # the fixed point of a weight w is guidance 1 / (1 - w). Rows without a caption keep the plain target.
            with torch.no_grad():
                target = target + cfg.train.guide_weight * (v - model(noisy, t, captions.ids[:1].expand(batch, -1)))
        loss = (v - target).square().mean()
        for opt in opts:
            opt.zero_grad(set_to_none=True)
        loss.backward()
        average_gradients(model)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for opt, lr in zip(opts, base_lr, strict=True):
            opt.param_groups[0]["lr"] = lr * pace(step, cfg)
            opt.step()
        decay = min(cfg.train.average, (1 + step) / (10 + step))
        with torch.no_grad():
            torch._foreach_lerp_(list(averaged.parameters()), list(model.parameters()), 1 - decay)
        sum_loss, seen = sum_loss + loss.item(), seen + batch * world
        if rank == 0 and (step + 1) % 50 == 0:
            board.add_scalar("generator/loss", sum_loss / 50, step + 1)
            log.info("step %d of %d: loss %.4f, %.0f images/s", step + 1, cfg.train.steps, sum_loss / 50, seen / (time.time() - began))
            sum_loss = 0.0
            began, seen = time.time(), 0
        if rank == 0 and ((step + 1) % cfg.train.eval_every == 0 or step + 1 == cfg.train.steps):
            scores = evaluate(cfg, averaged, vae, cfg.train.eval_number)
            for name, value in scores.items():
                board.add_scalar(f"generator/test_{name}", value, step + 1)
            log.info("step %d: test %s", step + 1, {k: round(v, 3) for k, v in scores.items()})
            save(path, step + 1, model, averaged, opts)
    return averaged


def save(path: Path, step: int, model: Generator, averaged: Generator, opts: list[torch.optim.Optimizer]) -> None:
    state = {
        "step": step,
        "model": model.state_dict(),
        "averaged": averaged.state_dict(),
        "optimisers": [opt.state_dict() for opt in opts],
    }
    partial = path.with_suffix(".tmp")
    torch.save(state, partial)
    os.replace(partial, path)


def package(cfg: DictConfig, folder: Path, model: Generator, vae: AutoencoderKL) -> None:
    """Phase 4. An ordinary StableDiffusion3Pipeline folder; the transformer in bfloat16."""
    tok = tokenizer.build()
    pipe = StableDiffusion3Pipeline(
        transformer=model.transformer.to(torch.bfloat16),  # halves the folder; the text encoders stay as they are, since
        # transformers would load them in bfloat16 where a user asks for nothing
        scheduler=FlowMatchEulerDiscreteScheduler(shift=cfg.shift),
        vae=vae,
        text_encoder=model.text_encoder,
        tokenizer=tok,
        text_encoder_2=model.text_encoder_2,
        tokenizer_2=tok,
        text_encoder_3=None,
        tokenizer_3=None,
    )
    pipe.save_pretrained(folder / "pipeline")


@hydra.main(version_base="1.3", config_path=CONF, config_name="pretrain")
def main(cfg: DictConfig) -> None:
    folder = Path(hydra.core.hydra_config.HydraConfig.get().runtime.output_dir)
    if "RANK" in os.environ:  # started by torchrun
        distributed.init_process_group("gloo")
    rank, world = rank_and_world()
    board = SummaryWriter(str(folder / f"tensorboard_{rank}" if rank else folder / "tensorboard"))
    if cfg.threads or world > 1:
        torch.set_num_threads(cfg.threads or 1)
    if world > 1 and not all((folder / name).exists() for name in ("vae", "latents_64.npy", "latents_128.npy")):
        raise SystemExit("the first two phases run in one process: start without torchrun, and with it once the latents are cached.")
    vae = train_vae(cfg, folder, board)
    model = train_generator(cfg, folder, board, vae)
    if rank == 0:
        package(cfg, folder, model, vae)
        log.info("pipeline written to %s", folder / "pipeline")
    board.close()
    if world > 1:
        distributed.destroy_process_group()


if __name__ == "__main__":
    main()
