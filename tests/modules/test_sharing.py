"""Modules made in Python, and flows on latents, as folders to share."""

import json
import shutil

import pytest
import torch

from flowkit.autoencoders import KLAutoencoder
from flowkit.data import Mixtures, SplitData
from flowkit.guidance import DropCond
from flowkit.modules import (
    BlockwiseFlowMatching,
    ConditionalFlowMatching,
    FlowModule,
    LatentFlowMatching,
    load_run,
)
from flowkit.modules.card import recipe_of
from flowkit.modules.checkpoints import build
from flowkit.modules.trust import trusting
from flowkit.nn import MLP, autoencoder_kl
from flowkit.paths import Cosine, Linear
from flowkit.sampling import ODESampler

MLP_NODE = {"_target_": "flowkit.nn.MLP", "shape": [3], "width": 8, "depth": 1, "num_classes": 2}
CONFIG = {
    "_target_": "flowkit.modules.ConditionalFlowMatching",
    "velocity": MLP_NODE,
    "path": {"_target_": "flowkit.paths.Cosine"},
    "drop_cond": {"_target_": "flowkit.guidance.DropCond", "prob": 0.1, "null": 2},
}


def made():
    """A module of points with two classes that has seen a batch."""
    torch.manual_seed(0)
    net = MLP((3,), 8, 1, num_classes=2)
    module = ConditionalFlowMatching(net, Cosine(), drop_cond=DropCond(0.1, 2))
    module.loss({"x1": torch.randn(4, 3), "cond": torch.tensor([0, 1, 0, 1])})
    return module


def drawn(module, **options):
    return module.sample(4, cond=torch.tensor([0, 1, 1, 0]), seeds=range(4), **options)


def test_a_module_made_in_python_is_saved_by_its_configuration(tmp_path):
    module = made()
    module.class_names, module.default_sampler = ["cat", "dog"], ODESampler(3, "rk4")
    module.save_pretrained(tmp_path / "new", config=CONFIG)
    loaded = ConditionalFlowMatching.from_pretrained(tmp_path / "new")
    assert drawn(loaded, guidance=2).equal(drawn(module, guidance=2))
    assert loaded.class_names == ["cat", "dog"]
    assert loaded.path == Cosine()
    loaded.save_pretrained(tmp_path / "again")  # it remembers its configuration
    first, second = (
        json.loads((tmp_path / n / "config.json").read_text()) for n in ("new", "again")
    )
    assert first == second


def test_without_a_configuration_the_error_says_what_to_write(tmp_path):
    with pytest.raises(ValueError, match=r"config must be given .* config=\{'_target_': 'flowkit"):
        made().save_pretrained(tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"velocity": {**MLP_NODE, "width": 16}}, "config must build the module, got other"),
        ({"velocity": {**MLP_NODE, "depth": 2}}, "got other classes or settings of velocity"),
        ({"path": {"_target_": "flowkit.paths.Linear"}}, r"got path Linear\(.*instead of Cosine"),
        ({"drop_cond": None}, "settings of drop_cond"),
        ({"drop_cond": {**CONFIG["drop_cond"], "prob": 0.2}}, "settings of drop_cond"),
        ({"_target_": "flowkit.modules.WeightedFlowMatching", "epsilon": 1.0}, "of the module"),
        ({"velocity": {"_target_": "os.system", "command": "ls"}}, "or you trust, got config.vel"),
    ],
)
def test_a_configuration_of_another_module_is_refused(change, words, tmp_path):
    node = {key: value for key, value in {**CONFIG, **change}.items() if value is not None}
    with pytest.raises(ValueError, match=words):
        made().save_pretrained(tmp_path / "new", config=node)
    assert not (tmp_path / "new").exists()


@pytest.fixture
def latent(tmp_path):
    """A flow on latents whose autoencoder lies in a folder; and its configuration."""
    torch.manual_seed(0)
    vae = autoencoder_kl((1, 8, 8), width=8, multipliers=(1, 2))
    KLAutoencoder(vae).save_pretrained(tmp_path / "vae")
    node = {
        "_target_": "flowkit.modules.LatentFlowMatching",
        "velocity": {"_target_": "flowkit.nn.MLP", "shape": [4, 4, 4], "width": 8, "depth": 1},
        "autoencoder": {
            "_target_": "flowkit.autoencoders.KLAutoencoder.from_pretrained",
            "path": str(tmp_path / "vae"),
            "image_shape": None,
        },
    }
    autoencoder = KLAutoencoder.from_pretrained(tmp_path / "vae")
    module = LatentFlowMatching(MLP((4, 4, 4), 8, 1), autoencoder, Linear())
    module.loss({"x1": torch.randn(2, 1, 8, 8)})
    return module, node


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_the_folder_of_a_flow_on_latents_is_whole(dtype, latent, tmp_path):
    module, node = latent
    module.save_pretrained(tmp_path / "new", config=node, dtype=dtype)
    assert str(tmp_path) not in (tmp_path / "new" / "config.json").read_text()
    shutil.rmtree(tmp_path / "vae")
    moved = (tmp_path / "new").rename(tmp_path / "moved")
    loaded = FlowModule.from_pretrained(moved)
    expected, found = (one.sample(3, seeds=range(3)) for one in (module, loaded))
    error = (expected - found).abs().max().item()
    assert error == 0 if dtype == "float32" else 0 < error < 2e-3
    assert (loaded.autoencoder.hash == module.autoencoder.hash) == (dtype == "float32")
    again = KLAutoencoder.from_pretrained(moved)  # as autoencoder.path=
    assert again.hash == loaded.autoencoder.hash
    with pytest.raises(ValueError, match="autoencoder must be the autoencoder of the cached lat"):
        loaded.encode({"x1": torch.zeros(1, 4, 4, 4), "encoded_by": "another"})


def test_another_autoencoder_in_the_folder_is_refused(latent, tmp_path):
    module, node = latent
    module.save_pretrained(tmp_path / "new", config=node)
    torch.manual_seed(1)
    other = KLAutoencoder(autoencoder_kl((1, 8, 8), width=8, multipliers=(1, 2)))
    other.save_pretrained(tmp_path / "new" / "autoencoder")
    with pytest.raises(ValueError, match="autoencoder must be the one that the flow was made with"):
        load_run(tmp_path / "new")


def test_an_autoencoder_of_the_hub_stays_a_reference(latent, tmp_path):
    module, node = latent
    node["autoencoder"]["path"] = "hub:owner/vae"
    module.configuration = {"module": node}
    module.save_pretrained(tmp_path / "new")
    assert not (tmp_path / "new" / "autoencoder").exists()
    config = json.loads((tmp_path / "new" / "config.json").read_text())
    assert config["module"]["autoencoder"]["path"] == "hub:owner/vae"
    assert config["state"]["autoencoder"]["hash"] == module.autoencoder.hash


def test_parts_of_the_training_alone_are_left_out(tmp_path):
    """An encoder with its projector: the shared model builds and samples without them."""
    blocks = {"_target_": "flowkit.blockwise.BlockwiseMLP", "shape": [3], "edges": [0, 0.5, 1]}
    blocks |= {"width": 8, "trunk_depth": 1}
    node = {"_target_": "flowkit.modules.BlockwiseFlowMatching", "velocity": blocks}
    torch.manual_seed(0)
    module = BlockwiseFlowMatching(
        build(blocks), encoder=lambda images: images[:, None], encoder_width=3, projector_width=4
    )
    module.sample_shape = (3,)
    module.configuration = {"module": {**node, "encoder": {"_target_": "mine"}}}
    module.save_pretrained(tmp_path / "new")
    loaded = load_run(tmp_path / "new")
    assert "projector" not in {name.partition(".")[0] for name in loaded.state_dict()}
    sampler = ODESampler(4)
    expected, found = (one.sample(3, sampler, seeds=range(3)) for one in (module, loaded))
    assert expected.equal(found)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"latents_std": 3}, "path must hold a whole AutoencoderKL"),
        ({"norm_num_groups": 0}, "path must hold a whole AutoencoderKL"),
        ({"quantization_config": {"quant_method": "gguf"}}, "got a quantized one"),
    ],
)
def test_a_strange_config_of_an_autoencoder_is_refused(config, message, tmp_path):
    network = autoencoder_kl((1, 8, 8), width=8, multipliers=(1, 2))
    KLAutoencoder(network).save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())
    assert "_name_or_path" not in stored
    (tmp_path / "config.json").write_text(json.dumps({**stored, **config}))
    with pytest.raises(ValueError, match=message):
        KLAutoencoder.from_pretrained(tmp_path)


class Own(Mixtures):
    """Own data of sounds."""


class Strange(SplitData):
    """Data with a command that there is not."""

    recipe = "draw"


def test_the_command_of_own_data_is_that_of_their_class():
    own, strange = (f"{__name__}.{name}" for name in ("Own", "Strange"))
    assert recipe_of({"data": {"_target_": own}}) == "sample"  # not imported without trust
    with trusting([own, strange]):
        assert recipe_of({"data": {"_target_": own}}) == "separate"
        with pytest.raises(ValueError, match=r"of .*\.Strange must be .*, separate, got 'draw'"):
            recipe_of({"data": {"_target_": strange}})
