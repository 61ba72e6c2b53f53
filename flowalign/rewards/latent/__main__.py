"""Train a latent reward: `python -m flowalign.rewards.latent reward=shapes model=tiny_sd3`; conf/latent_reward.yaml.

The model generates latents and any reward labels them; then the network is trained on them and evaluated on unseen
prompts. An interrupted run in the same run folder is resumed. The result is its subfolder `reward`, for
`reward=latent reward.objective.weights=FOLDER`.
"""

from __future__ import annotations

import hashlib
import json
import logging
import sys
from pathlib import Path
from typing import Any

import hydra
import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from flowalign.checks import ConfigError, as_config_errors, check_signatures
from flowalign.checks.preflight import preflight_or_exit
from flowalign.conditioner import Conditioner
from flowalign.models.base import FlowModel
from flowalign.process import silence_libraries
from flowalign.rewards.base import RewardError
from flowalign.rewards.latent.data import LatentMaker
from flowalign.rewards.latent.files import load, save
from flowalign.rewards.latent.losses import pairs
from flowalign.rewards.latent.network import Build, Network
from flowalign.rewards.latent.training import LabelledSet, Training, accuracies
from flowalign.rewards.latent.trunk import Trunk
from flowalign.run import CONF, instantiate, size_of

log = logging.getLogger("flowalign.latent")


def train(cfg: DictConfig, folder: Path) -> None:
    """Generate latents, train and evaluate. Results of earlier runs in the folder are reused."""
    device = torch.device(cfg.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    torch.manual_seed(cfg.seed)  # for the initialisation of the head
    model = instantiate(cfg.model).to(device)
    for denoiser in model.denoisers().values():
        denoiser.to(device)
    fit, build = instantiate(cfg.fit), instantiate(cfg.build)
    with torch.autocast(device.type, torch.bfloat16, enabled=cfg.precision == "bf16-mixed"):
        data = {part: labelled_set(cfg, part, model, folder / "latents", device) for part in ("train", "val")}
        network = new_network(model, build, data["train"], device)
        training = Training(network, data["train"], fit, folder / "training.ckpt", device)
        training.run()
        save(network, folder / "reward", {})
        saved = load(model, str(folder / "reward")).to(device)  # evaluate the saved weights, which are rounded
        accuracy = accuracies(saved, data["val"], cfg.sigmas, cfg.sampling.batch_size, device)
    save(network, folder / "reward", make_facts(cfg, accuracy, data["val"]))
    log.info("pairs of unseen prompts ordered correctly, by noise level:")
    for sigma, share in accuracy.items():
        log.info("  %4s  %.1f %%", sigma, 100 * share)


def labelled_set(cfg: DictConfig, part: str, model: FlowModel, folder: Path, device: torch.device) -> LabelledSet:
    """Labelled latents of one set of prompts, in a folder named by a hash of everything that they depend on."""
    size, media, sampling = size_of(cfg, "train"), instantiate(cfg[part]), instantiate(cfg.sampling)
    model.check_size(*size.area)
    scorer, prompts = instantiate(cfg.reward), instantiate(cfg.data[part])
    scorer.check()
    scorer.bind(model)
    conditioner = Conditioner(model, sampling.guidance > model.guidance_off, instantiate(cfg.encoding))
    # A fixed subset that alternates between classes, unless all prompts are used.
    rows = range(len(prompts)) if media.prompts >= len(prompts) else dict.fromkeys(prompts.fixed(media.prompts))
    subset = [prompts.prompts[i] for i in rows]
    dependencies = {key: to_container(cfg[key]) for key in ("model", "reward", "sampling", part)} | {
        "prompts": to_container(cfg.data[part]), "size": size.area,
    }  # fmt: skip
    digest = hashlib.sha256(json.dumps(dependencies, sort_keys=True).encode()).hexdigest()[:8]
    maker = LatentMaker(model, scorer, conditioner, sampling, size, device)
    return LabelledSet(maker(subset, media, folder / f"{part}_{digest}"), subset, conditioner, size)


def new_network(model: FlowModel, build: Build, data: LabelledSet, device: torch.device) -> Network:
    """An untrained network for tokens of the model's width."""
    trunk, row = Trunk(model, build.blocks).to(device), torch.zeros(1, dtype=torch.long)
    if build.trained and next(trunk.parameters()).dtype != torch.float32:
        raise ConfigError(
            "the blocks of a latent reward are trained in float32: set model.train_dtype=float32 (and "
            "precision=bf16-mixed for speed), or build.trained=0."
        )
    noise = torch.zeros(data.examples.x0.shape[1:])[None]
    with torch.no_grad():
        tokens = trunk(*data.noisy_batch(row, torch.ones(1, device=device), noise, torch.zeros(1)))
    return Network(trunk, build, tokens.shape[-1])


def make_facts(cfg: DictConfig, accuracy: dict[str, float], val: LabelledSet) -> dict[str, Any]:
    """Accuracy of the reward and the settings that it was made with."""
    number = len(pairs(val.examples.prompt, val.examples.label))
    made = {key: to_container(cfg[key]) for key in ("reward", "train", "val", "sampling", "fit", "seed")}
    return {"accuracy": accuracy, "pairs": number, "made": made}


def to_container(node: Any) -> Any:
    return OmegaConf.to_container(node, resolve=True) if OmegaConf.is_config(node) else node


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="latent_reward")
def _main(cfg: DictConfig) -> None:
    try:
        check_signatures(cfg)
        with as_config_errors():
            train(cfg, Path(HydraConfig.get().runtime.output_dir))
    except (ConfigError, RewardError) as error:
        log.error("%s", error)
        raise SystemExit(2) from None


def main() -> None:
    """Command-line entry point. A user error ends with one sentence and exit code 2."""
    silence_libraries()
    sys.argv[1:] = preflight_or_exit(sys.argv[1:], CONF, "latent_reward")
    _main()


if __name__ == "__main__":
    main()
