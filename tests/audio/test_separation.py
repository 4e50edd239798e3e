"""Separation by a run: long recordings by windows, measures, and what guidance means there."""

import math
from types import SimpleNamespace

import pytest
import torch

from flowkit.audio import LogMel, MelStates, frame_noise, log_mel_error
from flowkit.guidance import ClassifierFree, DropCond
from flowkit.metrics import train_classifier
from flowkit.modules import ConditionalFlowMatching
from flowkit.nn import SequenceDiT
from flowkit.paths import Linear
from flowkit.runs.separation import Separator, measure
from flowkit.runs.sounds import as_images, classifier_of
from flowkit.sampling import ODESampler
from tests.data.test_mixtures import tones

STATES = MelStates(LogMel())
SIZE = 40


class Module:
    """A flow that answers by a function of the noise and the condition."""

    def __init__(self, answer, decode=lambda states: states):
        self.answer, self.autoencoder = answer, SimpleNamespace(decode=decode)
        self.calls = 0

    def solve(self, x0, sampler, cond, guidance):
        self.calls += len(x0)
        return SimpleNamespace(x=self.answer(x0, cond))


def separator(answer, shape=(64, SIZE), states=STATES, split=None, **parts):
    module = Module(answer, **parts)
    run = SimpleNamespace(module=module, sample_shape=shape, guidance=None)
    split = split or tones(12)
    data = SimpleNamespace(
        states=states,
        frames=SIZE,
        query=lambda texts: split.query(texts),
        listed=lambda name: split if name == "test" else tones(12, name),
        classes=None,
    )
    return Separator(run, data, ODESampler(1))


def melody(samples):
    time = torch.arange(samples) / 16000
    return 0.3 * torch.sin(2 * math.pi * 220 * time * (1 + 0.1 * torch.sin(3 * time)))


@pytest.mark.parametrize("seconds", [0.3, 0.405, 47.0])
@pytest.mark.parametrize("overlap", [0, 13])
def test_the_whole_recording_is_a_fixed_point_at_any_length(seconds, overlap):
    wave = melody(int(16000 * seconds))
    one = separator(lambda x0, cond: cond["frames"])
    found, log_mel = one.separate(wave, "tone 0", 0, overlap)
    torch.testing.assert_close(log_mel, STATES.mel(wave[None])[0], atol=1e-4, rtol=0)
    torch.testing.assert_close(found, wave, atol=1e-5, rtol=0)
    frames, step = STATES.mel.frames(len(wave)), SIZE - overlap
    assert one.run.module.calls == 1 + max(0, math.ceil((frames - SIZE) / step))


def test_the_noise_belongs_to_the_frames():
    loud = MelStates(LogMel(), center=0.0, spread=1.0)
    wave = melody(16000)
    _, log_mel = separator(lambda x0, cond: x0, states=loud).separate(wave, "tone 1", 3, 10)
    torch.testing.assert_close(log_mel, frame_noise(64, 0, 101, 3), atol=1e-5, rtol=0)
    _, other = separator(lambda x0, cond: x0, states=loud).separate(wave, "tone 1", 4, 10)
    assert not torch.allclose(log_mel, other, atol=0.1)


def test_noise_of_latents_belongs_to_their_frames():
    image = MelStates(LogMel(), center=0.0, spread=1.0, layout="image")

    def decode(latents):  # (B, 2, SIZE / 4, 16): four frames and four bands a cell
        return latents[:, :1].repeat_interleave(4, 2).repeat_interleave(4, 3)

    one = separator(lambda x0, cond: x0, (2, SIZE // 4, 16), image, decode=decode)
    _, log_mel = one.separate(melody(16000), "tone 1", 3, 10)
    noise = frame_noise(32, 0, 26, 3).reshape(2, 16, 26)[0]
    whole = noise.repeat_interleave(4, 0).repeat_interleave(4, 1)[:, :101]
    torch.testing.assert_close(log_mel, whole, atol=1e-5, rtol=0)


def test_a_wrong_overlap_is_refused():
    one = separator(lambda x0, cond: x0)
    for overlap in (-1, SIZE):
        with pytest.raises(ValueError, match="overlap must"):
            one.separate(melody(16000), "tone 1", 0, overlap)


def test_measures_of_the_truth_and_of_the_mixture():
    split = tones(12)
    sounds, batch = split.sounds(slice(12)), split[:12]
    asked = [float(text[-1]) for text in sounds.captions]  # as the query encodes it
    states = {tuple(f[:3, 0].tolist()): k for k, f in enumerate(batch["cond"]["frames"])}

    def right(x0, cond):
        rows = [states[tuple(f[:3, 0].tolist())] for f in cond["frames"]]
        silent = torch.full_like(batch["x1"][0], STATES.silence)
        return torch.stack(
            [
                batch["x1"][k] if float(code) == asked[k] else silent
                for k, code in zip(rows, cond["vector"][:, 0], strict=True)
            ]
        )

    assert len(states) == 12
    found, _, log_mels = measure(separator(right), 12, 1, 0, 2, 5)
    assert found["num_mixtures"] == 12
    assert found["si_sdr_improvement"] == pytest.approx(found["si_sdr_improvement_of_truth"])
    assert found["si_sdr_improvement"] > 10
    assert found["si_sdr_improvement_of_other"] < found["si_sdr_improvement"] - 10
    assert found["log_mel_error"] < 1e-4
    assert log_mel_error(log_mels, STATES.mel(sounds.target)).max() < 1e-3
    assert found["energy"] == pytest.approx(found["energy_of_target"], abs=0.5)
    assert found["energy_of_absent"] < found["energy"] - 30

    same, _, _ = measure(separator(lambda x0, cond: cond["frames"]), 8, 1, 0, 2, 8)
    assert same["num_mixtures"] == 8
    assert same["si_sdr_improvement"] == pytest.approx(0, abs=1e-3)
    assert same["si_sdr_improvement_of_other"] == pytest.approx(0, abs=1e-3)
    assert same["energy"] == pytest.approx(0, abs=1e-3)
    assert same["energy_of_absent"] == pytest.approx(0, abs=1e-3)
    assert same["log_mel_error"] == pytest.approx(same["log_mel_error_of_mixture"], abs=1e-4)


def test_answers_are_classified_by_the_kind_that_is_asked_for(monkeypatch):
    monkeypatch.setattr("flowkit.runs.sounds.LEARNED", 600)
    sounds, states = tones(40).sounds(slice(None)), tones(40)[:40]
    rows = {tuple(f[:3, 0].tolist()): k for k, f in enumerate(states["cond"]["frames"])}
    rest = STATES.of_waves(sounds.mixture - sounds.target)

    def answers(log_mels):
        def answer(x0, cond):
            return torch.stack([log_mels[rows[tuple(f[:3, 0].tolist())]] for f in cond["frames"]])

        one = separator(answer, split=tones(40))
        one.data.classes = [f"tone {k}" for k in range(5)]
        return measure(one, 40, 1, 0, 2, 40)[0]

    true, wrong = answers(states["x1"]), answers(rest)
    assert true["class_agreement"] == true["class_agreement_of_truth"] == 1
    assert wrong["class_agreement"] == 0  # the other sound is always of another kind
    assert 0 < true["class_agreement_of_mixture"] < 1
    assert true["frechet_distance"] == pytest.approx(true["frechet_distance_of_truth"], rel=1e-4)
    assert true["frechet_distance"] < true["frechet_distance_of_mixture"] / 2
    for name in ("frechet_distance_of_truth", "class_agreement_of_mixture"):
        assert wrong[name] == true[name]
    assert true["features"] == wrong["features"]
    few = separator(lambda x0, cond: cond["frames"], split=tones(40))
    few.data.classes = [f"tone {k}" for k in range(5)]
    for count in (1, 31, 32):
        found = measure(few, count, 1, 0, 2, count)[0]
        assert found["class_agreement"] == found["class_agreement_of_mixture"]
        assert found["features"] == true["features"]
        distances = [name for name in found if "frechet" in name]
        assert len(distances) == (3 if count == 32 else 0)  # 16 features have 136 covariances


def quick_classifier(monkeypatch, cache):
    """Train on few sounds, in a cache of its own; return the list of trainings."""
    trained = []

    def train(images, *args, **options):
        trained.append(tuple(images.shape))
        return train_classifier(images, *args, **options)

    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    monkeypatch.setattr("flowkit.runs.sounds.LEARNED", 20)
    monkeypatch.setattr("flowkit.runs.sounds.train_classifier", train)
    return trained


def test_a_classifier_is_kept_for_its_own_settings_alone(monkeypatch, tmp_path):
    trained = quick_classifier(monkeypatch, tmp_path)
    one = separator(None)
    one.data.classes = [f"tone {k}" for k in range(5)]
    first, again = classifier_of(one.data), classifier_of(one.data)
    assert trained == [(20, 1, 64, 16)]
    assert first.hash == again.hash
    for name, value in (("EPOCHS", 2), ("FEATURES", 8), ("RANGE", 60.0), ("POOLED", 8)):
        monkeypatch.setattr(f"flowkit.runs.sounds.{name}", value)
        other = classifier_of(one.data)
        assert other.hash != again.hash, name
        assert other.hash == classifier_of(one.data).hash
        again = other
    assert len(trained) == 5
    assert trained[-1] == (20, 1, 64, 8)
    assert other(as_images(STATES.mel(tones(2).sounds(slice(None)).target))).shape == (2, 8)
    one.data.classes = [f"tune {k}" for k in range(5)]
    classifier_of(one.data)
    assert len(trained) == 6


def test_a_classifier_is_there_before_the_work(monkeypatch):
    def missing(data):
        raise ValueError("no classifier")

    def worked(x0, cond):
        raise AssertionError("separated first")

    monkeypatch.setattr("flowkit.runs.separation.classifier_of", missing)
    one = separator(worked)
    one.data.classes = ["tone"]
    with pytest.raises(ValueError, match="no classifier"):
        measure(one, 2, 1, 0, 2, 2)


@pytest.mark.parametrize(("frames", "cells"), [(8, 4), (17, 4), (80, 20)])
def test_sounds_of_any_length_are_seen_without_their_level(frames, cells):
    log_mels = torch.randn(3, 64, frames, generator=torch.Generator().manual_seed(0))
    images = as_images(log_mels)
    assert images.shape == (3, 1, 64, cells)
    torch.testing.assert_close(as_images(log_mels - 2.5), images)
    if frames == 80:
        below = 20 / math.log(10) * (log_mels[1, 7, 4:8] - log_mels[1].max())
        assert images[1, 0, 7, 1].item() == pytest.approx(1 + (below / 40).mean().item(), rel=1e-5)


def test_the_best_answer_is_that_of_each_mixture():
    def noisy(x0, cond):
        return cond["frames"] - 0.5 * x0.abs()

    one, _, _ = measure(separator(noisy, (64, 65)), 6, 1, 0, 2, 4)
    more, _, _ = measure(separator(noisy, (64, 65)), 6, 4, 0, 2, 4)
    assert one["si_sdr_improvement"] == more["si_sdr_improvement"]  # the first, in any batch
    assert one["si_sdr_improvement_best"] == one["si_sdr_improvement"]
    assert more["si_sdr_improvement_best"] > one["si_sdr_improvement"]


# --- a flow on such states --------------------------------------------------------------------


@pytest.fixture(scope="module")
def flow():
    torch.manual_seed(0)
    net = SequenceDiT((8, 12), width=16, depth=2, heads=2, frames=8, vector=4)
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return ConditionalFlowMatching(net, Linear(1e-4), drop_cond=DropCond(0.5, {"vector": 0.0}))


def cond_of(rows, length=12):
    return {"frames": torch.randn(rows, 8, length), "vector": torch.randn(rows, 4)}


def test_guidance_scales_differ_and_one_is_the_conditional_model_bit_for_bit(flow):
    cond, x0, sampler = cond_of(3), torch.randn(3, 8, 12), ODESampler(4)
    found = {scale: flow.solve(x0, sampler, cond, scale).x for scale in (None, 0, 1, 2)}
    assert torch.equal(found[1], found[None])
    null = {**cond, "vector": torch.zeros(3, 4)}  # only the text is dropped, not the mixture
    assert torch.equal(found[0], flow.solve(x0, sampler, null).x)
    for a, b in ((0, 1), (1, 2), (0, 2)):
        assert (found[a] - found[b]).abs().max() > 0.1


def test_the_coefficient_of_the_paper_is_a_scale_minus_one(flow):
    cond, x, t, w = cond_of(3), torch.randn(3, 8, 12), torch.rand(3), 0.7
    null = {**cond, "vector": torch.zeros(3, 4)}
    with torch.no_grad():
        v, v_null = flow.velocity(x, t, cond), flow.velocity(x, t, null)
        guided = ClassifierFree(flow.velocity, 1 + w, {"vector": 0.0})(x, t, cond)
    torch.testing.assert_close(guided, v + w * (v - v_null), atol=1e-5, rtol=1e-5)


def test_an_euler_step_of_the_true_velocity_leaves_sigma_min_of_the_noise():
    x0, x1, sigma = torch.randn(2, 8, 12), torch.randn(2, 8, 12), 1e-4
    exact = ConditionalFlowMatching(lambda x, t, cond: cond["frames"] - (1 - sigma) * x0)
    found = exact.solve(x0, ODESampler(1, "euler"), {"frames": x1}).x
    torch.testing.assert_close(found, x1 + sigma * x0, atol=1e-6, rtol=0)
    sample = Linear(sigma).sample(x0, x1, torch.ones(2))
    torch.testing.assert_close(sample.x_t, found, atol=1e-6, rtol=0)


def test_padding_a_batch_changes_neither_loss_nor_sample(flow):
    flow.eval()
    x1, x0, cond = torch.randn(2, 8, 12), torch.randn(2, 8, 12), cond_of(2)

    def padded(x):
        return torch.nn.functional.pad(x, (0, 5), value=3.0)

    frame_mask = torch.arange(17).expand(2, -1) < 12
    wide = {"frames": padded(cond["frames"]), "vector": cond["vector"], "frame_mask": frame_mask}
    with torch.no_grad():
        plain = flow.velocity(x0, torch.full((2,), 0.3), cond)
        found = flow.velocity(padded(x0), torch.full((2,), 0.3), wide)
    torch.testing.assert_close(found[..., :12], plain, atol=1e-6, rtol=0)
    sampler = ODESampler(3)
    alone = flow.solve(x0, sampler, cond).x
    together = flow.solve(padded(x0), sampler, wide).x[..., :12]
    torch.testing.assert_close(together, alone, atol=1e-6, rtol=0)

    times = torch.tensor([0.2, 0.7])

    def loss(batch):
        fixed = ConditionalFlowMatching(flow.velocity, Linear(1e-4), times=lambda *_: times)
        return fixed.loss(batch)["loss"]

    with torch.no_grad():
        short = loss({"x1": x1, "x0": x0, "cond": cond})
        mask = frame_mask[:, None].float()
        long = loss({"x1": padded(x1), "x0": padded(x0), "cond": wide, "mask": mask})
    torch.testing.assert_close(long, short, atol=1e-6, rtol=0)
