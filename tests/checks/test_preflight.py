"""Wrong command lines, each answered with one sentence that names what would have worked."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from flowalign.checks import ConfigError
from flowalign.checks.arguments import collapse_rewards, expand_rewards, quote_choices
from flowalign.checks.preflight import preflight, preflight_or_exit
from tests.checks.conftest import write
from tests.conftest import ROOT, installed


def refusal(conf: Path, *argv: str, name: str = "train") -> str:
    with pytest.raises(ConfigError) as caught:
        preflight(argv, conf, name)
    sentence = str(caught.value)
    assert "\n" not in sentence
    assert "Traceback" not in sentence
    return sentence


WRONG = {
    # keys
    "algo.kl_bta=0": "unknown option algo.kl_bta; did you mean algo.kl_beta?",
    "alog=nft": "unknown option alog; did you mean algo?",
    "kl_beta=0": "unknown option kl_beta; did you mean algo.kl_beta?",
    "algo.clip=1": "algo=nft has no clip, but algo=grpo has one",
    "~algo.adv_range": "algo.adv_range is null, which Hydra takes for absent: algo.adv_range=0 ~algo.adv_range removes",
    "algo.rounds=2": "the YAML does not list algo.rounds, but NFT takes it: add it with +algo.rounds=…",
    "num_steps=4": "did you mean rollout.num_steps or evaluation.num_steps?",
    "seed.x=3": "seed is a value, not a section; did you mean seed=42?",
    "~loger": "unknown option loger; did you mean logger?",
    "~logger": "~logger removes what every run needs: use another option (available: csv, tensorboard)",
    "~algo=nft": "~algo=nft removes what every run needs",
    "algo=[]": "algo=[] removes what every run needs: use another option (available: absent, grpo, nft)",
    "algo/nft=1": "unknown config group algo/nft; did you mean algo?",
    # groups
    "algo=nftt": "no algo called nftt; did you mean nft? (available: absent, grpo, nft)",
    "experiment=quik": "no experiment called quik; did you mean sd3/quick?",
    "resolution=65": "no resolution called 65; available: 128, 64",
    "logger=[csv,tensorbord]": "no logger called tensorbord; did you mean tensorboard?",
    "logger=false": "no logger called false; available: csv, tensorboard",
    "spare=one": "add it with +spare=one",
    "experiment=null": "leave experiment out",
    "experiment=torn": "torn.yaml, line 2",
    "hydra/launcher=joblib": "pip install 'flowalign[sweep]'",
    # plus signs
    "+experiment=long": "write experiment=long, without the plus",
    "+algo.kl_beta=1": "write algo.kl_beta=1, without the plus",
    "++algo=grpo": "did you mean algo=grpo?",
    "+algo.kl_bta=1": "algo.kl_bta: NFT has no parameter kl_bta; did you mean kl_beta?",
    "+sed=1": "nothing reads sed; did you mean seed?",
    "+alog=nft": "nothing reads alog; did you mean algo?",
    "+rollout.num_step=3": "nothing reads rollout.num_step; did you mean rollout.num_steps?",
    # values
    "algo.kl_beta=abc": "algo.kl_beta: expected a float, got 'abc'",
    "seed=abc": "seed: expected a number such as 42, got 'abc'",
    "train=maybe": "train: expected true or false, got 'maybe'",
    "rollout=5": "rollout: expected a section",
    "rollout={num_steps: 4, order: 3}": "the YAML does not list rollout.order: add it with +rollout.order=…",
    "algo.beta=${algo.kl_bta}": "algo.beta refers to ${algo.kl_bta}, which does not exist; did you mean algo.kl_beta?",
    "algo.beta=${oc.env:NO_SUCH_VARIABLE}": "'NO_SUCH_VARIABLE' not found",
    "algo.beta=${algo.beta}": "algo.beta: Recursive interpolation detected",
    # grammar and flags
    "algo": "algo has no value: options are written key=value",
    "=3": "=3 has no key",
    "algo.kl_beta=[1": "algo.kl_beta=[1 cannot be read",
    "--algo=nft": "did you mean algo=nft?",
    "--multrun": "did you mean --multirun?",
    # several values
    "logger=csv,tensorboard": "write logger=[csv,tensorboard] to have them together, or add -m",
    "algo=nft,grpo": "algo=nft,grpo gives several values: add -m",
    "resolution=64,128": "gives several values: add -m to run one job for each",
    # options that exclude each other
    "resolution=[64,128]": "would mix options that exclude each other: choose one, or write resolution=64,128 with -m",
    "algo=[nft,grpo]": "algo=[nft,grpo] would mix options that exclude each other: choose one, or write algo=nft,grpo",
}


@pytest.mark.parametrize("typed", WRONG)
def test_a_wrong_word_gets_one_sentence(conf: Path, typed: str):
    if typed == "hydra/launcher=joblib" and installed("hydra_plugins.hydra_joblib_launcher"):
        pytest.skip("it is right where the launcher is installed")
    assert WRONG[typed] in refusal(conf, typed)


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (("-m", "algo=grpo,nft", "algo.kl_beta=0,abc"), "algo.kl_beta: expected a float, got 'abc'"),
        (("-m", "algo=nft,nftt", "seed=1,2"), "no algo called nftt; did you mean nft?"),
        (("-m", "hydra.verbose=true,false"), "cannot be swept"),
        (
            ("algo=grpo", "algo.kl=gausian"),
            "expected one of 'x', 'gaussian', 'v', got 'gausian'; did you mean gaussian?",
        ),
        (("algo", "=", "nft"), "without spaces"),
        (("seed=1", "-m", "algo=nft,grpo"), "side by side"),
        (("--config-name", "trian"), "did you mean train?"),
        (("--config-name", "eval"), "ckpt_path needs a value: give it as ckpt_path=…"),
        (("--config-name", "broken"), "width refers to ${algo.kl_bta}"),
        (("--config-name", "sweeps"), "unknown option algo.kl_bta; did you mean algo.kl_beta?"),
        (("--config-dir", "no/such/folder"), "there is no such folder"),
        (("algo=absent",), "has no NTF; did you mean NFT?"),
    ],
)
def test_wrong_words_together_get_one_sentence(conf: Path, argv: tuple[str, ...], sentence: str):
    assert sentence in refusal(conf, *argv)


@pytest.mark.parametrize(
    "argv",
    [
        "",
        "algo=grpo dynamics=cps algo.clip=1 dynamics.eta=0.3 rollout.guidance=3 seed=null",
        "logger=[csv,tensorboard] +logger.csv.version=2 +spare=one experiment=sd3/quick ~seed",
        "-m resolution=64,128 algo.beta=interval(0,1) seed=range(0,1000)",
        "--help",
        "--hydra-help",
        "--cfg job no=such.key",
        "--info defaults",
        "-sc install=bash",
    ],
)
def test_what_hydra_accepts_passes(conf: Path, argv: str):
    preflight(argv.split(), conf, "train")


def test_the_last_value_of_a_long_sweep_is_tried_and_the_first_ones_are_not_multiplied(conf: Path):
    seen: list[tuple[str, int]] = []
    argv = ["-m", "algo=nft,grpo", "seed=range(0,1000)"]
    preflight(argv, conf, "train", also=lambda cfg: seen.append((cfg.algo._target_.rpartition(".")[2], cfg.seed)))
    assert seen == [("NFT", 0), ("GRPO", 0), ("NFT", 999)]


def test_a_further_check_sees_the_config_and_its_refusal_is_one_sentence(conf: Path):
    def also(cfg: DictConfig) -> None:
        assert "hydra" not in cfg
        assert cfg.output == "outputs/0"
        raise ValueError(f"algo={HydraConfig.get().runtime.choices['algo']}\ncannot work")

    with pytest.raises(ConfigError, match="^algo=grpo cannot work$"):
        preflight(["algo=grpo"], conf, "train", also)


def test_a_group_that_can_be_switched_off_is_told_how(conf: Path, tmp_path: Path):
    write(tmp_path, {"logger/none.yaml": "{}"})
    way = ("--config-dir", str(tmp_path))
    assert "logger=null is not understood by Hydra: use logger=none" in refusal(conf, "logger=null", *way)
    assert "~logger removes what every run needs: use logger=none" in refusal(conf, "~logger", *way)


def test_a_users_own_folder_is_honoured(conf: Path, tmp_path: Path):
    write(tmp_path, {"algo/mine.yaml": "{_target_: TOYS.NFT, beta: 2.0}"})
    assert "no algo called mine" in refusal(conf, "algo=mine")
    for way in (["--config-dir", str(tmp_path)], [f"hydra.searchpath=[file://{tmp_path}]"]):
        preflight(["algo=mine", *way], conf, "train")
        assert "did you mean mine? (available: absent, grpo, mine, nft)" in refusal(conf, "algo=min", *way)


def test_nothing_of_hydra_stays_behind(conf: Path):
    before = HydraConfig.instance().cfg
    preflight([], conf, "train")
    refusal(conf, "algo.kl_bta=0")
    assert not GlobalHydra.instance().is_initialized()
    assert HydraConfig.instance().cfg is before


def test_numeric_options_are_quoted_for_hydra_and_other_numbers_are_not(conf: Path):
    argv = ["resolution=64,128", "resolution=[64,a]", "+resolution=64", "seed=64", "resolution='64'", "-m"]
    assert quote_choices(argv, [conf]) == [
        "resolution='64','128'",
        "resolution=['64',a]",
        "+resolution='64'",
        "seed=64",
        "resolution='64'",
        "-m",
    ]
    assert preflight(["resolution=64"], conf, "train") == ["resolution='64'"]


def test_a_command_ends_with_code_2_and_the_sentence(
    conf: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    with pytest.raises(SystemExit) as left:
        preflight_or_exit(["algo=nftt"], conf, "train")
    assert left.value.code == 2
    assert capsys.readouterr().err == "error: no algo called nftt; did you mean nft? (available: absent, grpo, nft)\n"
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    with pytest.raises(ConfigError):
        preflight_or_exit(["algo=nftt"], conf, "train")


def test_it_imports_nothing_heavy():
    code = "import flowalign.checks.preflight, sys; print({'torch', 'lightning', 'diffusers'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ)
    assert done.stdout == "set()\n"


def test_a_file_that_overrides_groups_from_inside_its_own_is_told_its_first_line(tmp_path: Path):
    """Hydra names a group that nobody knows: dynamics@algo.dynamics."""
    (tmp_path / "algo").mkdir()
    text = (ROOT / "conf" / "algo" / "nft.yaml").read_text()
    (tmp_path / "algo" / "mine.yaml").write_text("# algo/mine.yaml\n" + text)
    with pytest.raises(ConfigError, match=r"`# @package _global_` as its first line"):
        preflight(["--config-dir", str(tmp_path), "algo=mine"], ROOT / "conf", "train")


# ------------------------------------------------------------ several rewards


def test_several_rewards_become_parts_ahead_of_what_sets_their_keys():
    argv = ("-m", "--config-dir=x", "reward.weights.b=2", "seed=1,2", "reward=[a, own/b]")
    assert expand_rewards(argv) == [
        *argv[:2],
        *("reward=several", "+reward@reward.parts.a=a", "+reward@reward.parts.b=own/b"),
        *("+reward.weights.a=1.0", "+reward.weights.b=1.0", "reward.weights.b=2", "seed=1,2"),
    ]


@pytest.mark.parametrize("words", [("reward=a",), ("reward=[a]",), ("reward=[a,b],[c,d]",), ("+x.reward=[a,b]",), ()])
def test_other_words_stay(words: tuple[str, ...]):
    assert expand_rewards(words) == collapse_rewards(words) == list(words)


def test_a_command_is_shown_as_it_was_typed():
    typed = ["reward=[a,b,c]", "reward.weights.b=2", "seed=1"]
    expanded = expand_rewards(typed)
    assert collapse_rewards(expanded) == typed
    assert (
        collapse_rewards([word for word in expanded if word != "+reward.weights.b=1.0"]) == typed
    )  # as Hydra lists it
    own = ["reward=several", "+reward@reward.parts.x=a", "+reward@reward.parts.y=a"]
    assert collapse_rewards(own) == own
