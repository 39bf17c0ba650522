"""What was saved before version 0.2, when the package was one flat folder: configs, checkpoints, pickled policies.

`tests/compat/` was written by the code of that time: a run of `fit` with test_resnet and affine=merged, its tensors
replaced by a short pattern so that they compress, what the network and the command said of it then, and a module of a
user who saves the policy as a hyperparameter.
"""

from __future__ import annotations

import gzip
import importlib
import json
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("lightning.pytorch")
pytest.importorskip("jsonargparse")

import lightning.pytorch as pl

import finetune_bn
from finetune_bn.backbones.weights import read_file
from finetune_bn.callbacks import BatchNormConversion
from finetune_bn.cli import FinetuneBNCLI, main
from finetune_bn.layers import FrozenBatchNorm
from finetune_bn.tasks import ImageClassification

FOLDER = Path(__file__).parent / "compat"
RUN_CONFIG = str(FOLDER / "run_config.yaml")
BEFORE: dict[str, Any] = json.loads((FOLDER / "outputs.json").read_text(encoding="utf-8"))
IMAGES = torch.linspace(-2, 2, 2 * 3 * 32 * 32).reshape(2, 3, 32, 32).sin()
QUIET = ("--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "false")


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["finetune-bn"])
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")


def unpacked(name: str) -> str:
    Path(name).write_bytes(gzip.decompress((FOLDER / f"{name}.gz").read_bytes()))
    return name


class Net(pl.LightningModule):
    def __init__(self, policy: Any, width: int = 2) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential(nn.Conv2d(3, width, 1), nn.BatchNorm2d(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x)  # type: ignore[no-any-return]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        finetune_bn.callbacks.replay(checkpoint, self)


def test_a_checkpoint_is_loaded_as_the_network_it_was() -> None:
    model = ImageClassification.load_from_checkpoint(unpacked("classification.ckpt"), map_location="cpu").eval()
    with torch.no_grad():
        torch.testing.assert_close(model(IMAGES), torch.tensor(BEFORE["logits"]), rtol=1e-4, atol=1e-4)
    kinds = {layer.affine_kind for layer in model.modules() if isinstance(layer, FrozenBatchNorm)}
    assert kinds == {"merged"}


def test_a_checkpoint_is_tested_from_its_run_config_as_it_was() -> None:
    args = ["--config", RUN_CONFIG, "--ckpt_path", unpacked("classification.ckpt"), "--trainer.callbacks", "[]", *QUIET]
    metrics = FinetuneBNCLI(["test", *args]).trainer.callback_metrics
    for name, value in BEFORE["metrics"].items():
        assert float(metrics[name]) == pytest.approx(value, rel=0.01, abs=0.01), name  # other versions resize otherwise


def test_a_run_config_is_trained_again_and_its_checkpoint_goes_on() -> None:
    short = ("--trainer.limit_val_batches", "1", "--trainer.num_sanity_val_steps", "0")
    cli = FinetuneBNCLI(["fit", "--config", RUN_CONFIG, *QUIET, *short, "--trainer.max_steps", "1"])
    assert cli.trainer.global_step == 1
    assert cli.model.net.bn1.affine_kind == "merged"
    checkpoint = ("--ckpt_path", unpacked("classification.ckpt"))
    cli = FinetuneBNCLI(["fit", "--config", RUN_CONFIG, *QUIET, *short, "--trainer.max_epochs", "2", *checkpoint])
    assert (cli.trainer.global_step, cli.trainer.current_epoch) == (8, 2), "four steps before the move, four after it"
    assert cli.model.net.bn1.affine_kind == "merged"


def test_a_run_config_is_planned(capsys: pytest.CaptureFixture[str]) -> None:
    main(["plan", "--config", RUN_CONFIG])
    assert "x freeze, affine=merged" in capsys.readouterr().out.splitlines()[0]


@pytest.mark.parametrize("weights_only", [False, True])
def test_a_policy_pickled_as_a_hyperparameter_is_the_policy(weights_only: bool) -> None:
    path = unpacked("policy_as_hyperparameter.ckpt")
    before = [(policy, f"finetune_bn.policies.{policy.__name__}") for policy in (finetune_bn.Rules, finetune_bn.Rule)]
    before += [(finetune_bn.Freeze, "finetune_bn.policies.Freeze")]
    with torch.serialization.safe_globals(before):
        net = Net.load_from_checkpoint(path, map_location="cpu", weights_only=weights_only).eval()
    assert net.hparams.policy == finetune_bn.Rules([("net.*", finetune_bn.Freeze("merged"))])
    with torch.no_grad():
        torch.testing.assert_close(net(IMAGES[:, :, :2, :2]), torch.tensor(BEFORE["policy_net"]))
    assert read_file(Path(path)).keys() == net.state_dict().keys(), "as weights it is read without unpickling"


def test_a_policy_is_pickled_under_the_name_that_users_import() -> None:
    policy = finetune_bn.Rules([("a.*", finetune_bn.Ghost(groups=2)), finetune_bn.Rule(finetune_bn.Keep(), stage=1)])
    data = pickle.dumps(policy)
    assert pickle.loads(data) == policy
    assert b"finetune_bn.conversion" not in data
    assert type(policy).__module__ == "finetune_bn"


@pytest.mark.parametrize("module", BEFORE["names"])
def test_every_public_name_of_before_is_where_it_was(module: str) -> None:
    there = importlib.import_module(module)
    assert [name for name in BEFORE["names"][module] if not hasattr(there, name)] == []


@pytest.mark.parametrize("path", ["finetune_bn.Freeze", "Freeze"])
def test_old_class_paths_in_a_config_are_understood(path: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = Path(RUN_CONFIG).read_text(encoding="utf-8").replace("finetune_bn.Freeze", path)
    if path == "Freeze":
        text = (
            text.replace("finetune_bn.tasks.", "")
            .replace("finetune_bn.data.", "")
            .replace("finetune_bn.callbacks.", "")
        )
    Path("config.yaml").write_text(text, encoding="utf-8")
    main(["plan", "--config", "config.yaml"])
    assert capsys.readouterr().out.startswith("ImageClassification: ")
    assert BatchNormConversion.__module__.startswith("finetune_bn.callbacks")


def test_modules_that_the_readme_of_version_0_1_taught_still_hand_out_their_names() -> None:
    code = (
        "from finetune_bn.step_limit import limit_steps\n"
        "from finetune_bn.samplers import PKBatchSampler, ResumableDataLoader\n"
        "from finetune_bn.leakage import measure_leakage\n"
        "import finetune_bn as fbn\n"
        "assert limit_steps is fbn.limit_steps and PKBatchSampler is fbn.PKBatchSampler\n"
        "try:\n    from finetune_bn.samplers import nothing\nexcept ImportError:\n    print('fine')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["fine"], done.stderr
    assert done.stderr.count("FutureWarning: finetune_bn.") == 3
