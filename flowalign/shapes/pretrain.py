"""Train the embedded pipeline from scratch: `python -m flowalign.shapes.pretrain` (`make pretrain`).

`torchrun --nproc-per-node 2 -m flowalign.shapes.pretrain` splits each batch between single-threaded processes, which on
a busy machine is far faster than two threads that synchronise at every operation.

There are four phases. Each writes its result to the run folder and is skipped if the result exists; the transformer
phase also resumes from its own last checkpoint. The result is an ordinary diffusers folder.
"""

from __future__ import annotations

import logging
import os
import time
from pathlib import Path

import hydra
import numpy as np
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline
from omegaconf import DictConfig
from torch import Tensor, distributed, nn
from torch.utils.tensorboard import SummaryWriter

from flowalign.files import atomic_write
from flowalign.shapes import tokenizer
from flowalign.shapes.data import Captions, cache_latents, draw_specs, pictures, to_numpy
from flowalign.shapes.muon import Muon
from flowalign.shapes.networks import Generator, new_vae
from flowalign.shapes.verify import verify
from flowalign.shapes.world import KINDS, specs

log = logging.getLogger("flowalign.pretrain")
CONF = str(next(p for p in (Path(__file__).parents[1] / "conf", Path(__file__).parents[2] / "conf") if p.is_dir()))


def train_vae(cfg: DictConfig, folder: Path, board: SummaryWriter) -> AutoencoderKL:
    """Phase 1: train the VAE with mean squared and absolute error plus a small KL term; every 12th batch is at 128
    pixels."""
    if (folder / "vae").is_dir():
        return AutoencoderKL.from_pretrained(folder / "vae").eval()
    torch.manual_seed(cfg.seed)
    vae = new_vae(cfg).to(memory_format=torch.channels_last)
    steps, batch = cfg.vae.steps, cfg.vae.batch
    optimiser = torch.optim.AdamW(vae.parameters(), lr=cfg.vae.lr, weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, cfg.vae.lr, total_steps=steps, pct_start=0.05)
    for step in range(steps):
        large = step % 12 == 11
        chosen = draw_specs(batch // 4 if large else batch, cfg.mix, seed=step)
        images = pictures(chosen, step * batch, 128 if large else 64).contiguous(memory_format=torch.channels_last)
        posterior = vae.encode(2 * images - 1).latent_dist
        error = vae.decode(posterior.sample()).sample - (2 * images - 1)
        kl = posterior.kl().mean() / posterior.mean[0].numel()
        optimiser.zero_grad(set_to_none=True)
        (error.square().mean() + 0.1 * error.abs().mean() + cfg.vae.kl * kl).backward()
        nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        if step % 50 == 0:
            mse = error.detach().square().mean().item()
            board.add_scalar("vae/mse", mse, step)
            log.info("vae step %d of %d: mse %.5f", step, steps, mse)
    finish_vae(cfg, vae.eval(), board)
    vae.save_pretrained(folder / "vae")
    return vae


@torch.no_grad()
def finish_vae(cfg: DictConfig, vae: AutoencoderKL, board: SummaryWriter) -> None:
    """Set scale and shift that normalise the latents, as in SD3's VAE, and log the strict score of a round trip."""
    z = vae.encode(2 * pictures(draw_specs(512, cfg.mix, 7), 0, 64) - 1).latent_dist.mean
    vae.register_to_config(scaling_factor=float(1 / z.std()), shift_factor=float(z.mean()))
    chosen = draw_specs(512, cfg.mix, 11)
    back = vae.decode(vae.encode(2 * pictures(chosen, 10**6, 64) - 1).latent_dist.mean).sample
    strict = float(np.mean([verify(im, s)[0] for im, s in zip(to_numpy(back), chosen, strict=True)]))
    log.info("vae: %.1f %% strict after a round trip", 100 * strict)
    board.add_scalar("vae/strict", strict, cfg.vae.steps)


def optimisers(cfg: DictConfig, model: Generator) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the blocks, AdamW for everything else."""
    matrices = [p for p in model.transformer.transformer_blocks.parameters() if p.ndim == 2]
    known = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in known]
    muon = Muon(matrices, lr=cfg.train.muon_lr)
    return [muon, torch.optim.AdamW(others, lr=cfg.train.adam_lr, betas=(0.9, 0.98), weight_decay=0.01, fused=True)]


def rank_and_world() -> tuple[int, int]:
    return (distributed.get_rank(), distributed.get_world_size()) if distributed.is_initialized() else (0, 1)


def average_gradients(model: nn.Module) -> None:
    """Average the gradients over processes, if there are several."""
    if distributed.is_initialized():
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        flat = torch.cat([g.flatten() for g in grads])
        distributed.all_reduce(flat)
        for grad, mean in zip(
            grads, (flat / distributed.get_world_size()).split([g.numel() for g in grads]), strict=True
        ):
            grad.copy_(mean.view_as(grad))


def lr_factor(step: int, cfg: DictConfig) -> float:
    """Learning-rate factor: warm-up, plateau, linear decay to zero. The plateau can be extended on resume."""
    decay = cfg.train.decay_share * cfg.train.steps
    return min((step + 1) / cfg.train.warmup, 1.0, max(cfg.train.steps - step, 0) / decay)


@torch.no_grad()
def evaluate(cfg: DictConfig, model: Generator, vae: AutoencoderKL, size: int, number: int) -> dict[str, float]:
    """Strict share overall and by kind on validation prompts at `size` pixels, with Euler on the scheduler's sigmas."""
    shares, captions = {}, Captions()
    scheduler = FlowMatchEulerDiscreteScheduler(shift=cfg.shift)
    scheduler.set_timesteps(cfg.train.eval_steps)
    for kind in KINDS:
        pool = [s for s in specs(kind) if s.split == "val"]
        chosen = [pool[i * 7919 % len(pool)] for i in range(number // 4)]
        noise = torch.Generator().manual_seed(1)
        x = torch.randn(len(chosen), cfg.latent_channels, size // 4, size // 4, generator=noise)
        ids = captions.draw(chosen, 0.0, np.random.default_rng(3))
        for s, s_next in zip(scheduler.sigmas[:-1], scheduler.sigmas[1:], strict=True):
            x = x + (s_next - s) * model(x, s.expand(len(x)), ids)
        images = to_numpy(vae.decode(x / vae.config.scaling_factor + vae.config.shift_factor).sample)
        shares[kind] = float(np.mean([verify(im, s)[0] for im, s in zip(images, chosen, strict=True)]))
    return {"strict": float(np.mean(list(shares.values()))), **shares}


class GeneratorTraining:
    """Phase 3: flow matching on cached latents with caption dropout; the result is a moving average of the weights."""

    def __init__(self, cfg: DictConfig, folder: Path, board: SummaryWriter, vae: AutoencoderKL) -> None:
        self.cfg, self.path, self.board, self.vae = cfg, folder / "generator.ckpt", board, vae
        torch.manual_seed(cfg.seed)
        self.model, self.averaged = Generator(cfg), Generator(cfg)
        self.averaged.load_state_dict(self.model.state_dict())
        self.averaged.requires_grad_(False)
        self.optimisers = optimisers(cfg, self.model)
        self.start = self._resume()
        self.data = {
            size: (cache_latents(cfg, folder, vae, size, n, seed), draw_specs(n, cfg.mix, seed))
            for size, n, seed in ((64, cfg.data.number_64, 10**7), (128, cfg.data.number_128, 2 * 10**7))
        }
        if cfg.train.compile:
            for block in self.model.transformer.transformer_blocks:
                block.compile(dynamic=False)
        self.captions = Captions()
        self.rank, self.world = rank_and_world()

    def _resume(self) -> int:
        if not self.path.exists():
            return 0
        state = torch.load(self.path, weights_only=True)
        self.model.load_state_dict(state["model"])
        self.averaged.load_state_dict(state["averaged"])
        for opt, held in zip(self.optimisers, state["optimisers"], strict=True):
            opt.load_state_dict(held)
        log.info("resumed at step %d", state["step"])
        return state["step"]

    def _save(self, step: int) -> None:
        state = {
            "step": step,
            "model": self.model.state_dict(),
            "averaged": self.averaged.state_dict(),
            "optimisers": [opt.state_dict() for opt in self.optimisers],
        }
        with atomic_write(self.path) as file:
            torch.save(state, file)

    def run(self) -> Generator:
        train, losses, began = self.cfg.train, [], time.time()
        for step in range(self.start, train.stop):
            losses.append(self._step(step))
            if self.rank == 0 and (step + 1) % 50 == 0:
                speed = len(losses) * train.batch / (time.time() - began)
                self.board.add_scalar("generator/loss", np.mean(losses), step + 1)
                log.info("step %d of %d: loss %.4f, %.0f images/s", step + 1, train.stop, np.mean(losses), speed)
                losses, began = [], time.time()
            if self.rank == 0 and ((step + 1) % train.eval_every == 0 or step + 1 == train.stop):
                self._report(step + 1)
                self._save(step + 1)
        return self.averaged

    def _report(self, step: int) -> None:
        for size in (64, 128):
            scores = evaluate(self.cfg, self.averaged, self.vae, size, self.cfg.train.eval_number * 64 // size)
            for name, value in scores.items():
                self.board.add_scalar(f"generator/val_{size}_{name}", value, step)
            log.info("step %d: val at %d pixels %s", step, size, {k: round(v, 3) for k, v in scores.items()})

    def _step(self, step: int) -> float:
        loss = self._loss(step)
        for opt in self.optimisers:
            opt.zero_grad(set_to_none=True)
        loss.backward()
        average_gradients(self.model)
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for opt, lr in zip(self.optimisers, (self.cfg.train.muon_lr, self.cfg.train.adam_lr), strict=True):
            opt.param_groups[0]["lr"] = lr * lr_factor(step, self.cfg)
            opt.step()
        decay = min(self.cfg.train.average, (1 + step) / (10 + step))
        with torch.no_grad():
            torch._foreach_lerp_(list(self.averaged.parameters()), list(self.model.parameters()), 1 - decay)
        return loss.item()

    def _loss(self, step: int) -> Tensor:
        """Loss of this rank's rows. The whole batch depends only on (seed, step), not on the number of ranks."""
        cfg, stage = self.cfg, stage_of(self.cfg, step)
        rng = np.random.default_rng([cfg.seed, step])
        noise = torch.Generator().manual_seed(int(rng.integers(2**62)))
        large = step % cfg.data.every_128 == cfg.data.every_128 - 1
        latents, scenes = self.data[128 if large else 64]
        batch = cfg.train.batch // (4 if large else 1)
        rows = np.sort(rng.integers(len(latents), size=batch))
        ids = self.captions.draw([scenes[r] for r in rows], cfg.train.caption_dropout, rng)
        # Logit-normal times, as in SD3.
        t = torch.sigmoid(stage.time_mean + stage.time_std * torch.randn(batch, generator=noise))
        eps = torch.randn(batch, *latents.shape[1:], generator=noise)
        mine = slice(self.rank, None, self.world)
        rows, ids, t, eps = rows[mine], ids[mine], t[mine], eps[mine]
        x0 = torch.from_numpy(latents[rows].astype(np.float32))
        weight = t.view(-1, 1, 1, 1)
        noisy, target = (1 - weight) * x0 + weight * eps, eps - x0
        v = self.model(noisy, t, ids)
        if stage.guide_weight:
            # Model guidance (arXiv:2502.12154): the network learns its own guided velocity, so that one call per step
            # is enough. The fixed point of weight w is guidance 1 / (1 - w). Without a caption the target stays plain.
            with torch.no_grad():
                target = target + stage.guide_weight * (v - self.model(noisy, t, self.captions.empty(len(rows))))
        return (v - target).square().mean()


def stage_of(cfg: DictConfig, step: int) -> DictConfig:
    """The stage of the curriculum at a step."""
    return next(stage for stage in cfg.train.stages if step < stage.until)


def package(cfg: DictConfig, folder: Path, model: Generator, vae: AutoencoderKL) -> None:
    """Phase 4: write an ordinary StableDiffusion3Pipeline folder, with the transformer in bfloat16."""
    tok = tokenizer.build()
    vae.register_to_config(_name_or_path="")  # otherwise the folder would contain this machine's paths
    pipe = StableDiffusion3Pipeline(
        # bfloat16 halves the folder. The text encoders stay in float32, since transformers would by default load them
        # in bfloat16.
        transformer=model.transformer.to(torch.bfloat16),
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
        raise SystemExit("the first two phases run in one process: use torchrun only once the latents are cached.")
    vae = train_vae(cfg, folder, board)
    model = GeneratorTraining(cfg, folder, board, vae).run()
    if rank == 0 and cfg.train.stop:
        package(cfg, folder, model, vae)
        log.info("pipeline written to %s", folder / "pipeline")
    board.close()
    if world > 1:
        distributed.destroy_process_group()


if __name__ == "__main__":
    main()
