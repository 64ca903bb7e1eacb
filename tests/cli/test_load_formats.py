"""--load_checkpoint takes whatever convert_weight.py and transform_ckpt.py write, as it is."""

import pytest

from mixtral_ms import Trainer, load_config
from mixtral_ms.cli.commands.convert import main as convert
from mixtral_ms.cli.commands.transform import main as transform
from mixtral_ms.errors import UserError

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def trained(tiny_run, tmp_path_factory):
    """A run, and its weights in every form."""
    folder = tmp_path_factory.mktemp("formats")
    yaml, ours = tiny_run / "run.yaml", tiny_run / "output" / "checkpoint"
    hf, ckpt, gmm, cut = (folder / name for name in ("hf", "whole.ckpt", "gmm.ckpt", "cut"))
    convert(["--reversed", "--input_path", str(ours), "--output_path", str(hf)])
    convert(["--input_path", str(ours), "--output_path", str(ckpt)])
    convert(["--use_gmm=True", f"--pre_ckpt_path={ckpt}", f"--mindspore_ckpt_path={gmm}",
             "--dtype=fp32"])  # fmt: skip
    transform(["--src_ckpt_dir", str(ours), "--dst_ckpt_dir", str(cut), "--dst_strategy",
               "dp=2,mp=2,ep=2,zero=1", "--format", "ckpt"])  # fmt: skip
    return yaml, {"ours": ours, "hf": hf, "ckpt": ckpt, "gmm": gmm, "cut": cut}


def evaluate(yaml, weights, *settings):
    overrides = ["run_mode=eval", f"load_checkpoint={weights}", *settings]
    return Trainer(load_config(yaml, overrides)).evaluate()


@pytest.fixture(scope="module")
def expected(trained):
    yaml, forms = trained
    return evaluate(yaml, forms["ours"])


@pytest.mark.parametrize("form", ["hf", "ckpt", "gmm", "cut"])
def test_the_loss_is_the_same_whatever_is_loaded(form, trained, expected):
    yaml, forms = trained
    assert evaluate(yaml, forms[form]).loss == expected.loss


def test_the_strategy_may_lie_elsewhere(trained, expected, tmp_path):
    yaml, forms = trained
    parts = tmp_path / "parts"
    parts.mkdir()
    for rank in forms["cut"].glob("rank_*"):
        (parts / rank.name).symlink_to(rank)
    with pytest.raises(UserError, match="4 ranks: give --src_strategy_path_or_dir too"):
        evaluate(yaml, parts)
    strategy = f"src_strategy_path_or_dir={forms['cut'] / 'strategy'}"
    assert evaluate(yaml, parts, strategy).loss == expected.loss


def test_another_networks_weights_are_refused_by_name(trained):
    yaml, forms = trained
    wider = "model.model_config.intermediate_size=64"
    with pytest.raises(UserError, match=r"w1\.weight has shape \(48, 32\), expected is \(64, 32\)"):
        evaluate(yaml, forms["hf"], wider)
    assert evaluate(yaml, forms["hf"], wider, "allow_partial=True").loss > 0
