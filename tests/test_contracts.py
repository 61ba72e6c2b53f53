"""Every option of every group, found by looking: a newcomer's YAML is tested by existing."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from omegaconf import OmegaConf
from torch import Tensor

from flowalign.algorithms import Algorithm
from flowalign.checks import ConfigError, check_signatures
from flowalign.checks.signatures import locate
from flowalign.compatibility import check_groups
from flowalign.dynamics import ODE, Dynamics, FlowSDE
from flowalign.flow import interpolate, mean_dims
from flowalign.geometry import PlanError
from flowalign.recipe import batch_plan
from flowalign.run import build_recipe, build_trainer, check, instantiate, plan_accumulation
from flowalign.types import Point
from tests.conftest import TINY, composition, installed, settled

if TYPE_CHECKING:
    from omegaconf import DictConfig

    Nodes = dict[str, dict[str, DictConfig]]

CONF = Path(__file__).parents[1] / "conf"
OPTIONS = sorted(str(path.relative_to(CONF).with_suffix("")) for path in CONF.glob("*/**/*.yaml"))
ALGORITHMS = [option.removeprefix("algo/") for option in OPTIONS if option.startswith("algo/")]
STEPS = [option.removeprefix("steps/") for option in OPTIONS if option.startswith("steps/")]
DYNAMICS = [option.removeprefix("dynamics/") for option in OPTIONS if option.startswith("dynamics/")]
OWN = {a: (CONF / "algo" / f"{a}.yaml").read_text().partition("override /dynamics: ")[2].split()[0] for a in ALGORITHMS}
"""The dynamics that each algorithm chooses."""
EXTRAS = {"hparams_search/optuna": "hydra_plugins.hydra_optuna_sweeper"}
"""Options that compose only with an extra of the package."""

NEEDS = {"reward/several": ("+reward@reward.parts.jpeg=jpeg", "+reward@reward.parts.brightness=brightness")}
"""What an option needs beside it."""


def refused(cfg: DictConfig) -> str:
    """What check_groups says against a config, or nothing."""
    try:
        check_groups(cfg)
    except ConfigError as refusal:
        return str(refusal)
    return ""


@pytest.mark.parametrize("option", OPTIONS)
def test_every_option_composes_and_its_classes_accept_what_it_says(compose: Callable[..., DictConfig], option: str):
    if option in EXTRAS and not installed(EXTRAS[option]):
        pytest.skip(f"{option} needs {EXTRAS[option]}")
    group, _, name = option.rpartition("/")
    cfg = compose(
        f"{group}='{name}'", *NEEDS.get(option, ()), paths=group != "paths"
    )  # quoted, since 64 would be a number
    if group == "paths":
        cfg.paths.output_dir = "outputs"
    if refusal := refused(cfg):  # with the default of another group; the grid below has every pair
        assert "use " in refusal
    check_signatures(cfg)


SHAPING = [option for option in OPTIONS if option.startswith(("algo/", "steps/", "times/", "debug/"))]
"""Options that say how many points there are, or how they are cut; experiments are below."""
SHAPED = ("grpo", "mixgrpo", "tempflow", "nft", "prfl")
"""Algorithms of every kind of points: recorded, of a window, of branches, re-noised, and beside given ones."""


@pytest.mark.parametrize("option", SHAPING)
def test_the_batch_plan_of_every_option_fits_with_every_algorithm(compose: Callable[..., DictConfig], option: str):
    group, _, name = option.rpartition("/")
    others = ALGORITHMS if group == "steps" else SHAPED
    for algo in [()] if group == "algo" else [(f"algo={algo}",) for algo in others]:
        cfg = compose(*algo, f"{group}={name}")
        if refused(cfg):
            continue
        parts = {part: instantiate(cfg[part]) for part in ("steps", "times", "rollout", "batch")}
        recipe = SimpleNamespace(algorithm=instantiate(cfg.algo), scorer=instantiate(cfg.reward), **parts)
        try:
            batch_plan(recipe)  # type: ignore[arg-type]
        except PlanError as refusal:  # groups of so many branches are the user's to choose
            assert "trunks of" in str(refusal)  # noqa: PT017


@pytest.mark.parametrize("name", sorted(path.stem for path in CONF.glob("*.yaml")))
def test_the_configs_at_the_top_compose(compose: Callable[..., DictConfig], name: str):
    check_signatures(compose(name=name, paths=name == "train"))


@pytest.mark.parametrize(
    "words",
    [
        ("algo=tempflow", "batch.group_size=8", "steps.branches=2"),
        ("experiment=published_grpo", "algo.clip=3.0e-4", "callbacks=none", "logger=[csv,tensorboard]"),
        ("~reward.held_out", "++resolution.train.frames=5", "+data.extra={a: [1, null]}", "seed=null"),
        ("resolution='64'", "~logger", "task_name=${seed} apart", "hydra.verbose=true"),
    ],
)
def test_the_composition_of_the_tests_is_that_of_hydra(words: tuple[str, ...]):
    """With values set after the choices, and in the right order of words that have a say in both."""
    from hydra import compose, initialize_config_dir

    words = tuple(settled(*TINY, *words))
    with initialize_config_dir(str(CONF), version_base="1.3"):
        theirs = compose("train", list(words))
    for _ in range(2):  # what the first is done to, the second does not know of
        ours = composition("train", *words)
        assert OmegaConf.to_yaml(ours) == OmegaConf.to_yaml(theirs)
        assert OmegaConf.is_struct(ours)
        ours.seed, ours.algo.kl_beta = 99, 99.0


@pytest.mark.parametrize("option", OPTIONS)
def test_a_leaf_is_small_and_says_what_it_is(option: str):
    text = (CONF / f"{option}.yaml").read_text()
    assert len(text.splitlines()) <= 40
    assert text.endswith("\n")
    assert "/home/" not in text


# ------------------------------------------------------------ experiments


EXPERIMENTS = [option.removeprefix("experiment/") for option in OPTIONS if option.startswith("experiment/")]


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_a_recipe_is_accepted_on_its_own_devices_and_on_one(compose: Callable[..., DictConfig], name: str):
    cfg = compose(f"experiment={name}")
    check(cfg)
    size = cfg.trainer.devices * cfg.trainer.num_nodes
    assert not cfg.evaluation.num_val % size
    assert not cfg.evaluation.num_test % size
    cfg.trainer.num_nodes = cfg.trainer.devices = 1
    check(cfg)


@pytest.mark.parametrize(
    ("name", "own"),
    [
        ("dance_grpo_flux1_dev_hpsv2", (720, 720)),
        ("mixgrpo_flash_flux1_dev_multi_reward", (720, 720)),
        ("flowawr_flux1_dev_hpsv3", (720, 1024)),
    ],
)
def test_a_resolution_that_is_named_wins_over_the_one_of_a_recipe(
    compose: Callable[..., DictConfig], name: str, own: tuple[int, int]
):
    for words, sides in (((), own), (("resolution='512'",), (512, 512))):
        resolution = compose(f"experiment={name}", *words).resolution
        assert (resolution.train.height, resolution.eval.width) == sides


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_the_header_of_a_recipe_names_paper_hardware_score_and_its_own_command(name: str):
    package, *lines = (CONF / "experiment" / f"{name}.yaml").read_text().partition("defaults:")[0].splitlines()
    assert package == "# @package _global_"
    fields = dict(re.findall(r"^# (paper|hardware|score): (.+)$", "\n".join(lines), re.MULTILINE))
    assert set(fields) == {"paper", "hardware", "score"}
    assert re.search(r"arXiv:\d{4}\.\d{5}\b", fields["paper"])
    commands = [line for line in lines if "train.py" in line]
    assert [re.findall(r" experiment=(\w+)", command) for command in commands] == [[name]]


def test_a_recipe_decodes_in_the_precision_of_its_method(compose: Callable[..., DictConfig]):
    """DanceGRPO and MixGRPO load the VAE in bfloat16; DiffusionNFT and FlowAWR decode under autocast."""
    in_float32 = ("flow_grpo", "grpo_guard", "tempflow", "awm")
    for name in (name for name in EXPERIMENTS if "_sd3_5_" in name or "_flux1_" in name):
        assert (compose(f"experiment={name}").model.get("vae_dtype") == "float32") == name.startswith(in_float32), name


def test_a_recipe_for_flux_reads_as_many_tokens_of_a_prompt_as_its_method(compose: Callable[..., DictConfig]):
    """DanceGRPO and MixGRPO encode prompts by the pipeline's default; the others pass 128, as for SD3.5."""
    for name in (name for name in EXPERIMENTS if "_flux1_" in name):
        tokens = 512 if name.startswith(("dance_grpo", "mixgrpo")) else 128
        assert compose(f"experiment={name}").model.max_sequence_length == tokens, name


def test_only_flowawr_on_flux_evaluates_with_the_solver_of_its_rollouts(compose: Callable[..., DictConfig]):
    for name in (name for name in EXPERIMENTS if "_sd3_5_" in name or "_flux1_" in name):
        solver = compose(f"experiment={name}").evaluation.sampling.solver._target_
        assert solver.endswith("DPM" if name.startswith("flowawr_flux1") else "Euler"), name


def test_the_rewards_of_mixgrpo_are_averaged(compose: Callable[..., DictConfig]):
    """Its code divides the weights by their sum; three rewards of weight 1 would give three times the advantage."""
    for name in (name for name in EXPERIMENTS if name.startswith("mixgrpo")):
        weights = compose(f"experiment={name}").reward.weights
        assert len(set(weights.values())) == 1
        assert sum(weights.values()) == pytest.approx(1, abs=1e-5)


def test_the_page_of_recipes_lists_every_published_one():
    own = {"sd3_5_medium", "flux1_24gb", "published_grpo", "published_nft", "train_small_judge_large"}
    page = (CONF.parent / "docs/recipes.md").read_text()
    assert sorted(re.findall(r"\| `(\w+)` \|$", page, re.MULTILINE)) == sorted(set(EXPERIMENTS) - own)
    assert all(f"`{name}`" in page for name in own)


# ------------------------------------------------------------ algorithms and dynamics


SMALL = {"fast": ("steps.width=2",), "branch": ("steps.branches=2", "steps.num=1"), "random": ("steps.num=2",)}
"""What a choice of steps needs besides in the tiny geometry of 2 pictures in 4 steps."""
CHOSEN = {"flow_grpo_fast": "fast", "tempflow": "branch"}
"""The algorithms that choose one of those."""


def small(algo: str, steps: str | None = None) -> tuple[str, ...]:
    """The overrides of SMALL for what is chosen."""
    return SMALL.get(steps or CHOSEN.get(algo, ""), ())


def fitting(cfg: DictConfig) -> DictConfig:
    """The tiny config with a micro-batch that fits, whatever an algorithm couples."""
    parts = {part: instantiate(cfg[part]) for part in ("steps", "times", "rollout")}
    recipe = SimpleNamespace(algorithm=instantiate(cfg.algo), scorer=instantiate(cfg.reward), **parts)
    for micro in (3, 2, 1, 6):
        cfg.batch.micro = micro
        recipe.batch = instantiate(cfg.batch)
        try:
            batch_plan(recipe)  # type: ignore[arg-type]
        except ValueError:
            continue
        return cfg
    cfg.batch.updates, cfg.batch.micro = 1, 12  # groups that are not to be torn leave one update
    return cfg


def trained(cfg: DictConfig) -> tuple[Any, Any]:
    """Module and trainer after an epoch, which must have led somewhere finite."""
    from flowalign.module import AlignModule

    recipe = build_recipe(cfg)
    module = AlignModule(recipe)
    trainer = build_trainer(cfg, plan_accumulation(cfg, recipe))
    trainer.fit(module)
    assert trainer.global_step == cfg.batch.updates
    assert trainer.callback_metrics["train/loss"].isfinite()
    assert all(parameter.isfinite().all() for parameter in module.live.trained().values())
    return module, trainer


def advised(refusal: str) -> list[tuple[str, str]]:
    """The options that a refusal names: at least one."""
    found = re.findall(r"(algo|dynamics|steps)=(\w+)(?=, or |\.)", refusal)
    assert found, refusal
    return found


@pytest.fixture(scope="session")
def options() -> Nodes:
    """The nodes of every dynamics and steps in the tiny geometry: to compose each combination would be slow."""
    return {
        "dynamics": {o: composition("train", f"dynamics={o}").dynamics for o in DYNAMICS},
        "steps": {o: composition("train", f"steps={o}", *SMALL.get(o, ())).steps for o in STEPS},
    }


@pytest.fixture
def random(random_sd3: tuple[str, ...], sd3_reward: Path) -> Callable[[str], tuple[str, ...]]:
    """The overrides that choose a random pipeline, and its latent reward for an algorithm that follows one."""

    def chosen(algo: str) -> tuple[str, ...]:
        *pipeline, reward = random_sd3
        return (*pipeline, f"reward.objective.weights={sd3_reward}" if algo == "prfl" else reward)

    return chosen


@pytest.mark.parametrize("algo", ALGORITHMS)
def test_every_algorithm_trains_with_all_that_is_shown_and_kept(
    tiny: Callable[..., DictConfig], random: Callable[[str], tuple[str, ...]], tmp_path: Path, algo: str
):
    _, trainer = trained(fitting(tiny(f"algo={algo}", *random(algo), *small(algo), "callbacks=default")))
    assert (tmp_path / "checkpoints" / "last.ckpt").is_file()
    assert trainer.callback_metrics["val/reward"].isfinite()


@pytest.mark.parametrize(
    ("algo", "dynamics"),
    [
        pytest.param(a, d, marks=() if a in ("grpo", "nft") or d == OWN[a] else pytest.mark.slow)
        for a in ALGORITHMS
        for d in DYNAMICS
    ],
)
def test_every_combination_trains_an_epoch_or_is_refused_with_one_that_would(
    tiny: Callable[..., DictConfig],
    options: dict[str, dict[str, DictConfig]],
    random: Callable[[str], tuple[str, ...]],
    algo: str,
    dynamics: str,
):
    silent = "trainer.check_val_every_n_epoch=9"
    configs = {name: tiny(f"algo={name}", silent, *random(name), *small(name)) for name in {algo, "grpo", "nft"}}

    def combined(algo: str, dynamics: str, steps: str) -> DictConfig:
        cfg = configs[algo]
        cfg.dynamics, cfg.steps = options["dynamics"][dynamics], options["steps"][steps]
        return cfg

    for steps in STEPS:
        choice = {"algo": algo, "dynamics": dynamics, "steps": steps}
        if not (refusal := refused(combined(**choice))):
            trained(fitting(combined(**choice)))
            continue
        for group, option in advised(refusal):
            assert not refused(combined(**choice | {group: option})), refusal


@pytest.mark.parametrize("times", [option.removeprefix("times/") for option in OPTIONS if option.startswith("times/")])
def test_a_choice_of_times_trains_an_epoch(tiny: Callable[..., DictConfig], times: str):
    trained(tiny(f"times={times}", "times.num=3", "trainer.check_val_every_n_epoch=9"))


def test_a_choice_of_steps_goes_with_an_algorithm_that_replays_them(tiny: Callable[..., DictConfig]):
    for option in STEPS:
        steps = instantiate(tiny("algo=grpo", f"steps={option}").steps)
        plan = steps(0, 10)
        assert len(plan.noisy) == 10
        assert plan.trained
        assert all(plan.noisy[i] for i in plan.trained)
        assert steps(0, 10) == plan
        assert {steps(epoch, 10).points for epoch in range(60)} == {plan.points}


@pytest.fixture(params=ALGORITHMS)
def algorithm(request: pytest.FixtureRequest, tiny: Callable[..., DictConfig]) -> Algorithm:
    """Without a penalty, which is a gradient of its own."""
    return instantiate(tiny(f"algo={request.param}", "algo.kl_beta=0").algo)


def point(algorithm: Algorithm, v: Tensor, advantage: Tensor) -> Point:
    """A point that the policy v has made itself, of the kind that the algorithm trains on: three groups of two."""
    generator = torch.Generator().manual_seed(0)

    def draw() -> Tensor:
        return torch.randn(v.shape, generator=generator)

    sigma, group = torch.linspace(0.9, 0.3, 3).repeat_interleave(2), torch.arange(3).repeat_interleave(2)
    frozen = {name: v.detach().clone() for name in algorithm.frozen}
    whose = {"group": group, "sample": torch.arange(6), "frozen": frozen}
    if algorithm.point == "noised":
        x0, eps = draw(), draw()
        if algorithm.shared_noise:
            eps = eps[::2].repeat_interleave(2, dim=0)
        p = Point(interpolate(x0, eps, sigma), sigma, advantage, x0=x0, eps=eps, sigma_next=sigma - 0.1, **whose)
        if algorithm.follows_reward:
            p.reward = -mean_dims(algorithm.lands(p, v)[0] ** 2)
        return p
    dynamics = getattr(algorithm, "dynamics", FlowSDE())
    x, sigma_next, sigma_max = draw(), sigma - 0.1, torch.full_like(sigma, 0.95)
    x_next, mean, std = dynamics.step(x, v.detach(), sigma, sigma_next, sigma_max, draw())
    log_prob = dynamics.log_prob(x_next, mean, std)
    recorded = {"x_next": x_next, "sigma_next": sigma_next, "sigma_max": sigma_max, "log_prob": log_prob, "mean": mean}
    return Point(x, sigma, advantage, std_scale=torch.ones(6), **recorded, **whose)


VARIANTS = {
    "crd": ("algo.temperature=0.5",),
    "flowawr": ("algo.mask_zero=true",),
    "grpo_guard": ("algo.parity=true",),
    "awm": ("algo.ratio=sum_first",),
}
"""Settings with means over the rows of a micro-batch."""


def velocities() -> Tensor:
    return torch.randn(6, 3, 4, generator=torch.Generator().manual_seed(1))


def test_a_loss_is_finite_and_one_number_a_sample_wherever_the_policy_went(algorithm: Algorithm):
    v = velocities()
    p = point(algorithm, v, torch.tensor([-9.0, -1.0, 0.0, 1.0, 9.0, 0.0]))
    for live in (v, v + 0.1 * velocities().flip(0), 0 * v):
        loss, metrics = algorithm.loss(p, live)
        assert loss.shape == (6,)
        assert loss.isfinite().all()
        for name, value in metrics.items():
            assert value.shape == (6,), name
            assert value.isfinite().all(), name
            assert not value.requires_grad, name


def test_on_policy_no_advantage_is_no_gradient_and_an_advantage_is_one(algorithm: Algorithm):
    if algorithm.source == "images" or algorithm.follows_reward:
        pytest.skip("without advantages")
    for advantage, moves in ((torch.zeros(6), False), (torch.tensor([1.0, -1.0, 2.0, 0.0, 0.0, -2.0]), True)):
        v = velocities().requires_grad_()
        algorithm.loss(point(algorithm, v, advantage), v)[0].sum().backward()
        assert v.grad is not None
        assert bool(v.grad.abs().max() > 1e-5) is moves


def test_samples_do_not_touch_each_other_unless_the_loss_couples_them(algorithm: Algorithm):
    v = velocities().requires_grad_()
    algorithm.loss(point(algorithm, v, torch.tensor([1.0, -1.0] * 3)), v)[0][2].backward()
    assert v.grad is not None
    assert v.grad[2].abs().max() > 0
    apart = [0, 1, 4, 5] if algorithm.together == "group" else [0, 1, 3, 4, 5]
    assert v.grad[apart].abs().max() == 0


@pytest.mark.parametrize("algo", ALGORITHMS)
@pytest.mark.parametrize("dropped", [[4], [0, 4], [2, 3], [0, 2, 4]])
def test_rows_that_could_not_be_scored_might_as_well_not_be_there(
    tiny: Callable[..., DictConfig], algo: str, dropped: list[int]
):
    """With a penalty, which pulls at a row without advantage too."""
    algorithm: Algorithm = instantiate(tiny(f"algo={algo}", "algo.kl_beta=0.3", *VARIANTS.get(algo, ())).algo)
    made = velocities()
    p = point(algorithm, made, torch.tensor([2.0, -1.0, 0.5, 0.0, -0.5, -1.0]))
    p.advantage[dropped] = 0.0
    # Somewhere else than the policy that made the points, and than its copies.
    p.frozen = {name: v + 0.1 * i * velocities().flip(0) for i, (name, v) in enumerate(p.frozen.items(), start=1)}
    rest = [i for i in range(6) if i not in dropped]
    v, scored = (made + 0.05 * velocities().flip(1)).requires_grad_(), torch.ones(6)
    scored[dropped] = 0
    p.weight = scored / scored.mean()
    together = torch.autograd.grad((algorithm.loss(p, v)[0] * p.weight).mean(), v)[0]
    p.weight = None
    alone = torch.autograd.grad(algorithm.loss(p.index(torch.tensor(rest)), v[rest])[0].mean(), v)[0]
    assert alone[rest].abs().max() > 0
    assert torch.allclose(together, alone, rtol=1e-5, atol=1e-9)
    assert together[dropped].abs().max() == 0


@pytest.mark.parametrize("dynamics", DYNAMICS)
def test_without_noise_every_dynamics_is_the_ode(tiny: Callable[..., DictConfig], dynamics: str):
    cfg = tiny(f"dynamics={dynamics}")
    if "eta" not in cfg.dynamics:
        assert not locate(cfg.dynamics["_target_"]).stochastic
        return
    x, v = velocities()[:5], velocities().flip(0)[:5]
    sigma, sigma_next = torch.tensor([1.0, 0.9, 0.6, 0.3, 0.1]), torch.tensor([0.9, 0.7, 0.5, 0.1, 0.0])
    euler, _ = ODE().moments(x, v, sigma, sigma_next)

    def distance(eta: float) -> tuple[float, float]:
        noisy: Dynamics = locate(cfg.dynamics["_target_"])(eta=eta)
        mean, std = noisy.moments(x, v, sigma, sigma_next, torch.tensor(0.9))
        return float((mean - euler).abs().max()), float(std.abs().max())

    mean_gap, std = distance(1e-3)
    assert mean_gap < 1e-4
    assert 0 < std < 1e-2
    assert distance(0.5)[0] > 1e-2
    assert not locate(cfg.dynamics["_target_"])(eta=0.0).stochastic


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (("dynamics=flow_sde", "algo=grpo", "dynamics.eta=0"), r"dynamics.eta=0 .* use dynamics.eta=0.7, or algo=nft"),
        (("algo=grpo", "optimisation.guidance=3"), r"differs from rollout.guidance=1.0.*leave optimisation.guidance"),
        (("batch.group_size=1",), r"gives every advantage 0.*use at least 2"),
        (("algo=grpo", "algo.dynamics={_target_: flowalign.dynamics.CPS}"), r"leave it at \$\{dynamics\}"),
        (("algo=nft", "dynamics=cps", "steps=window"), r"algo=NFT replays none: use steps=all, or algo=grpo"),
        (("algo=nft", "dynamics=ode", "steps=branch"), r"algo=NFT replays none: use steps=all\."),
        (("algo=mixgrpo", "steps.parity=true"), r"windows of several sizes.*use steps.parity=false"),
        (("algo=mixgrpo", "steps.width=3"), r"window of 3 does not fit into 4 steps.*use steps.width=2"),
        (("algo=grpo", "steps=branch", "steps.num=1"), r"group_size=2 is not .* trunks of 4 branches: use .*size=4"),
        (("algo=nft", "rollout.same_noise=true"), r"pictures of a group equal: use rollout.same_noise=false"),
        (("algo=dpo", "batch.extremes=2"), r"trains on 2 pictures .* its own rule: leave batch.extremes=null"),
        (("algo=tempflow", "steps.branches=2", "batch.extremes=2"), r"compares those of a branch: leave batch.ext"),
        (
            ("algo=grpo", "dynamics=cps", "steps=all", "steps.trained=1", "batch.micro=4"),
            r"has no density: use steps.trained=0.99",
        ),
        (
            ("callbacks=hacking_guard", "callbacks.hacking_guard.gold=quality"),
            r"gold=quality .* are val/reward, val/strict",
        ),
        (
            ("callbacks=hacking_guard", "~reward.held_out"),
            r"gold=val/quality is measured by no reward; there are val/re",
        ),
        (
            ("callbacks=hacking_guard", "reward=shapes_win_rate"),
            r"objective=val/reward is measured by no reward; there are val/strict, val/quality",
        ),
        (("algo=sft", "batch.extremes=2"), r"learns from given pictures without any: leave batch.extremes=null"),
    ],
)
def test_groups_that_contradict_each_other_are_refused(tiny: Callable[..., DictConfig], overrides: Any, sentence: str):
    with pytest.raises(ConfigError, match=sentence):
        check(tiny(*overrides))
