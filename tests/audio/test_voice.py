"""Content of speech, and the velocity of a conversion that knows it alone."""

import math

import pytest
import torch

from flowkit.audio import (
    LogMel,
    MelStates,
    PhoneRecognizer,
    Recognition,
    VoiceVelocity,
    content,
)
from flowkit.audio.content import Labeled, varied
from flowkit.audio.listening import PHONES
from flowkit.guidance import ClassifierFree, DropCond
from flowkit.modules import ConditionalFlowMatching, Regression
from flowkit.nn import SequenceDiT
from flowkit.paths import Linear
from flowkit.sampling import ODESampler
from tests.audio.conftest import write_recognizer

BANDS, STATES = 12, MelStates(LogMel())
GENERATOR = torch.Generator().manual_seed(0)


@pytest.fixture(scope="module")
def recognizer():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = PhoneRecognizer(BANDS, width=8, codes=5)
        net.codebook.normal_()
    return net.eval()


# --- content ----------------------------------------------------------------------------------


def test_content_does_not_depend_on_padding(recognizer):
    states = torch.randn(2, BANDS, 30, generator=GENERATOR)
    alone = recognizer.content(states)
    mask = torch.arange(50).expand(2, -1) < 30
    for value in (0.0, 3.0):
        padded = torch.nn.functional.pad(states, (0, 20), value=value)
        found = recognizer.content(padded, mask)[..., :30]
        torch.testing.assert_close(found, alone, atol=1e-6, rtol=0)


def test_a_frame_has_the_content_of_its_17_frames(recognizer):
    states = torch.randn(1, BANDS, 41, generator=GENERATOR)
    other = states.clone()
    other[..., 20] += 5
    changed = (recognizer.hidden(states) - recognizer.hidden(other))[0].abs().amax(1) > 1e-5
    assert changed.nonzero()[:, 0].tolist() == list(range(12, 29))


def test_content_is_posteriors_and_the_nearest_code(recognizer):
    states = torch.randn(2, BANDS, 30, generator=GENERATOR)
    posteriors, codes = recognizer.content(states).split([len(PHONES), 8], 1)
    torch.testing.assert_close(posteriors.sum(1), torch.ones(2, 30))
    torch.testing.assert_close(posteriors.mT.log(), recognizer(states).log_softmax(-1))
    hidden = recognizer.hidden(states)
    for row in range(2):
        for frame in range(30):
            distances = (recognizer.codebook - hidden[row, frame]).norm(dim=1)
            assert torch.equal(codes[row, :, frame], recognizer.codebook[distances.argmin()])


def test_codes_are_centers_of_clusters():
    net = PhoneRecognizer(BANDS, width=3, codes=2)
    spread = 0.01 * torch.randn(40, 3, generator=GENERATOR)
    frames = torch.cat([spread + 1, spread[:20] - 1])
    net.fit_codes(frames)
    found = net.codebook[net.codebook[:, 0].argsort()]
    torch.testing.assert_close(found, torch.stack([frames[40:].mean(0), frames[:40].mean(0)]))
    with pytest.raises(ValueError, match="number of frames must be at least 2"):
        net.fit_codes(frames[:1])


def labeled():
    """Utterances whose phone is the loud band of a frame."""
    generator = torch.Generator().manual_seed(1)
    states, phones = [], []
    for length in (30, 200, 90):
        own = torch.randint(1, 5, (length // 10,), generator=generator).repeat_interleave(10)
        x = 0.3 * torch.randn(BANDS, length, generator=generator)
        x[2 * own, torch.arange(length)] += 3
        states.append(x)
        phones.append(own)
    return Labeled(lambda: (states, phones), "bands")


def test_windows_keep_each_frame_with_its_phone():
    speech = labeled()
    counts = torch.zeros(3)
    for _ in range(60):
        x, phones, mask = speech.windows(GENERATOR)
        loudest = x[:, 2:10:2].argmax(1) + 1
        assert (loudest == phones)[mask].float().mean() > 0.99
        assert not x.mT[~mask].any()
        sizes = mask.sum(1)
        counts += torch.stack([(sizes == n).sum() for n in (30, 128, 90)])
    share = counts / counts.sum()
    expected = torch.tensor([30, 200, 90]) / 320
    assert (share - expected).abs().max() < 0.06  # 960 draws: 3.7 standard errors


def test_a_recognizer_learns_phones_once_and_leaves_the_generator_alone(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("flowkit.audio.content.SAMPLE", 400)
    recognition, speech, state = Recognition(None, 16, 6, 60), labeled(), torch.get_rng_state()
    net = recognition.recognizer(speech, "hash")
    assert torch.equal(torch.get_rng_state(), state)
    x, phones, mask = speech.windows(GENERATOR)
    assert (net(x, mask).argmax(-1) == phones)[mask].float().mean() > 0.9
    assert len(net.codebook.unique(dim=0)) == 6
    monkeypatch.setattr(Recognition, "_trained", None)  # the second time it is only read
    again = recognition.recognizer(labeled(), "hash")
    assert again.hash == net.hash
    with pytest.raises(TypeError):
        recognition.recognizer(labeled(), "other states")
    net.save(file := tmp_path / "net.safetensors")
    assert Recognition(file, 16, 6).recognizer(speech, "hash").hash == net.hash
    for given, message in (
        (Recognition(file, 8, 6), "with width 8, got 16"),
        (Recognition(file, 16, 5), "with codes 5, got 6"),
    ):
        with pytest.raises(ValueError, match=message):
            given.recognizer(speech, "hash")
    with pytest.raises(ValueError, match="with states other, got hash"):
        Recognition(file, 16, 6).recognizer(speech, "other")


def test_a_recognizer_is_kept_for_its_own_constants_alone(tmp_path, monkeypatch):
    trained = []

    def train(self, speech, states):
        trained.append(states)
        return PhoneRecognizer(BANDS, self.width, self.codes, states)

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(Recognition, "_trained", train)
    halved = ("WINDOW", "ROWS", "GAIN", "WARP", "LEARNING_RATE", "DECAY", "SAMPLE", "ROUNDS")
    others = {name: getattr(content, name) / 2 for name in halved}
    for name, value in {"": None, **others, "PHONES": content.PHONES[1:]}.items():
        if name:
            monkeypatch.setattr(f"flowkit.audio.content.{name}", value)
        before = len(trained)
        for _ in range(2):
            Recognition(None, 8, 4, 1).recognizer(labeled(), "hash")
        assert len(trained) == before + 1, name


def test_other_vocal_tracts_move_bands_and_levels():
    states = torch.zeros(400, 40, 2)
    states[:, 20] = 8.0
    found = varied(states, torch.Generator().manual_seed(0))
    level = found[:, 0, 0]
    assert 0.2 < level.std() < 0.4
    peaks = (found - level[:, None, None])[..., 0].argmax(1)
    assert peaks.min() in (17, 18)  # 20 / 1.15
    assert peaks.max() in (23, 24)  # 20 / 0.85
    plain = states + level[:, None, None]
    torch.testing.assert_close(found[..., 0], found[..., 1])
    assert (found - plain).abs().amax((1, 2)).median() > 4


# --- the velocity -----------------------------------------------------------------------------

NULL = {"frames": 0.0, "vector": 0.0, "tokens": 0.0, "token_mask": 0.0}


@pytest.fixture(scope="module")
def flow(recognizer):
    torch.manual_seed(0)
    sizes = {"frames": 6, "vector": 4, "tokens": BANDS}
    net = SequenceDiT((BANDS, 20), width=16, depth=2, heads=2, **sizes)
    velocity = VoiceVelocity(net, PhoneRecognizer(BANDS, width=8, codes=5))
    for parameter in velocity.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    velocity.take(recognizer)
    return ConditionalFlowMatching(velocity, Linear(1e-4), drop_cond=DropCond(0.5, NULL))


def cond_of(rows, length=20, count=7):
    return {
        "frames": torch.randn(rows, BANDS, length),
        "frame_mask": torch.ones(rows, length, dtype=torch.bool),
        "vector": torch.randn(rows, 4),
        "tokens": torch.randn(rows, count, BANDS),
        "token_mask": torch.ones(rows, count, dtype=torch.bool),
    }


def test_one_is_the_conditional_model_bit_for_bit_and_scales_differ(flow):
    cond, x0, sampler = cond_of(3), torch.randn(3, BANDS, 20), ODESampler(4)
    found = {scale: flow.solve(x0, sampler, cond, scale).x for scale in (None, 0, 1, 1.7)}
    assert torch.equal(found[1], found[None])
    null = {**cond, **{name: torch.zeros_like(cond[name]) for name in NULL}}
    assert torch.equal(found[0], flow.solve(x0, sampler, null).x)
    for a, b in ((0, 1), (1, 1.7), (0, 1.7)):
        assert (found[a] - found[b]).abs().max() > 0.01


def test_the_coefficient_of_the_paper_is_a_scale_minus_one(flow):
    cond, x, t, w = cond_of(3), torch.randn(3, BANDS, 20), torch.rand(3), 0.7
    null = {**cond, **{name: torch.zeros_like(cond[name]) for name in NULL}}
    with torch.no_grad():
        v, v_null = flow.velocity(x, t, cond), flow.velocity(x, t, null)
        guided = ClassifierFree(flow.velocity, 1 + w, NULL)(x, t, cond)
    torch.testing.assert_close(guided, v + w * (v - v_null), atol=1e-5, rtol=1e-5)


def test_padding_changes_neither_loss_nor_sample(flow):
    flow.eval()
    x1, x0, cond = torch.randn(2, BANDS, 20), torch.randn(2, BANDS, 20), cond_of(2)

    def padded(x, count):
        return torch.nn.functional.pad(x, (0, count), value=3.0)

    wide = {
        "frames": padded(cond["frames"], 5),
        "frame_mask": torch.arange(25).expand(2, -1) < 20,
        "vector": cond["vector"],
        "tokens": padded(cond["tokens"].mT, 4).mT,
        "token_mask": torch.arange(11).expand(2, -1) < 7,
    }
    sampler, times = ODESampler(3), torch.tensor([0.2, 0.7])
    alone = flow.solve(x0, sampler, cond, 1.7).x
    together = flow.solve(padded(x0, 5), sampler, wide, 1.7).x[..., :20]
    torch.testing.assert_close(together, alone, atol=1e-6, rtol=1e-6)
    for module in (
        ConditionalFlowMatching(flow.velocity, Linear(1e-4), times=lambda *_: times),
        Regression(flow.velocity),
    ):
        with torch.no_grad():
            short = module.loss({"x1": x1, "x0": x0, "cond": cond})["loss"]
            module.sample_shape, mask = None, wide["frame_mask"][:, None].float()
            batch = {"x1": padded(x1, 5), "x0": padded(x0, 5), "cond": wide, "mask": mask}
            long = module.loss(batch)["loss"]
        torch.testing.assert_close(long, short, atol=1e-6, rtol=1e-6)


def test_the_network_knows_only_the_content_of_the_source(flow, monkeypatch):
    cond, other, x, t = cond_of(2), cond_of(2), torch.randn(2, BANDS, 20), torch.rand(2)
    mixed = {**cond, "frames": other["frames"]}
    with torch.no_grad():
        first, second = flow.velocity(x, t, cond), flow.velocity(x, t, mixed)
        assert (first - second).abs().max() > 1e-3
        content = flow.velocity.content.content(cond["frames"])
        monkeypatch.setattr(flow.velocity.content, "content", lambda states, mask: content)
        torch.testing.assert_close(flow.velocity(x, t, mixed), first)
        bound = flow.velocity.bind(mixed)
        assert torch.equal(bound(x, t), flow.velocity(x, t, mixed))


def test_a_training_leaves_the_recognizer_as_it_is(flow, recognizer):
    velocity = flow.velocity
    assert velocity.content.hash == recognizer.hash
    batch = {"x1": torch.randn(2, BANDS, 20), "cond": cond_of(2)}
    flow.loss(batch, torch.Generator().manual_seed(0))["loss"].backward()
    assert all(p.grad is None for p in velocity.content.parameters())
    assert velocity.fuse.weight.grad.abs().max() > 0
    flow.zero_grad()
    with pytest.raises(ValueError, match=r"content\.width must be 8, got 9"):
        velocity.take(PhoneRecognizer(BANDS, width=9, codes=5))
    with pytest.raises(TypeError, match="cond must be a mapping with the source as frames"):
        velocity(torch.zeros(1, BANDS, 20), torch.zeros(1))
    with pytest.raises(ValueError, match="net must be built with frames"):
        VoiceVelocity(SequenceDiT((BANDS, 20), 16, 1, 2), recognizer)


def test_a_stored_recognizer_is_the_same(tmp_path):
    net = PhoneRecognizer.load(write_recognizer(tmp_path / "a.safetensors", STATES))
    assert net.config == {"n_mels": 64, "width": 8, "codes": 4, "states": STATES.hash}
    states = torch.randn(1, 64, 20, generator=GENERATOR)
    again = PhoneRecognizer.load(tmp_path / "a.safetensors")
    assert torch.equal(again.content(states), net.content(states))
    assert math.isfinite(net.content(states).sum())
