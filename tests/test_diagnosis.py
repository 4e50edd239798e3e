"""Diagnosis: each fault is named by its own line, and sound networks have no alarm."""

from functools import partial

import pytest
import torch
from torch import nn

from flowkit.checks import expand_like
from flowkit.diagnosis import Finding, diagnose
from flowkit.diagnosis.diagnose import ordered
from flowkit.diagnosis.examples import Watched, draw_examples, mean_of
from flowkit.diagnosis.readings import Read, Reading
from flowkit.diagnosis.solves import distance_of
from flowkit.exact import GaussianFlow, MixtureFlow
from flowkit.losses import flow_matching_loss
from flowkit.nn import ResidualMLP
from flowkit.paths import VP, Cosine, Linear
from flowkit.sampling import ODESampler

COUNT, CLASSES, STD = 200, 4, 0.3


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


class Classes:
    """The exact flow to a class-conditional mixture of Gaussians."""

    def __init__(self, seed=0, noise=1.0):
        self.means, self.noise = torch.randn(CLASSES, 2, generator=seeded(seed)), noise

    def draw(self, count, generator):
        labels = torch.randint(CLASSES, (count,), generator=generator)
        points = self.means[labels] + STD * torch.randn(count, 2, generator=generator)
        return torch.randn(count, 2, generator=generator), points, labels

    def __call__(self, x, t, cond):
        mean, t = self.means[cond], expand_like(t, x)
        variance = ((1 - t) * self.noise) ** 2 + (t * STD) ** 2
        return mean + (t * STD**2 - (1 - t) * self.noise**2) / variance * (x - t * mean)

    def all(self, x, t, cond):
        return MixtureFlow(torch.ones(CLASSES), self.means, torch.full((CLASSES,), STD))(x, t)


FLOW = Classes()
X0, X1, LABELS = FLOW.draw(COUNT, seeded())


def alarms(velocity, x0=X0, x1=X1, cond=LABELS, **options):
    return [finding for finding in diagnose(velocity, x0, x1, cond, **options) if not finding.ok]


def broken(f, classes):
    """Faults of a network that hold for any network, by the name of the line and a note."""
    return {
        ("time direction", "reversed"): lambda x, t, c: f(x, 1 - t, c),
        ("time direction", "noise − data"): lambda x, t, c: -f(x, 1 - t, c),
        ("time direction", "thousandths"): lambda x, t, c: f(x, t / 1000, c),
        ("output", "negated"): lambda x, t, c: -f(x, t, c),
        ("output", "data"): lambda x, t, c: x + expand_like(1 - t, x) * f(x, t, c),
        ("output", "noise"): lambda x, t, c: x - expand_like(t, x) * f(x, t, c),
        ("labels", "shifted"): lambda x, t, c: f(x, t, (c + 1) % classes),
        ("labels", "reversed"): lambda x, t, c: f(x, t, classes - 1 - c),
        ("bfloat16", "sums"): lambda x, t, c: f((x + 300) - 300, t, c),
        ("loss over t", "late"): lambda x, t, c: f(x, t, c) * expand_like(t < 0.9, x),
        ("repeatable", "dropout"): lambda x, t, c: nn.functional.dropout(f(x, t, c), 0.1),
    }


@pytest.mark.parametrize("case", broken(FLOW, CLASSES), ids=" ".join)
def test_a_broken_network_is_named_by_its_fault(case):
    torch.manual_seed(0)  # of the dropout
    assert alarms(broken(FLOW, CLASSES)[case])[0].name == case[0]


@pytest.mark.parametrize(
    "velocity",
    [FLOW.all, lambda x, t, c: FLOW(x, t, torch.zeros_like(c))],
    ids=["unconditional", "one class"],
)
def test_ignored_conditions_are_named(velocity):
    found = {finding.name: finding for finding in diagnose(velocity, X0, X1, LABELS)}
    assert not found["conditions"].ok
    assert "change the velocity by 0 %" in found["conditions"].figure


@pytest.mark.parametrize(
    ("end", "scale", "flow", "x1"),
    [("data", 0.18, FLOW, X1 / 0.18), ("noise", 2.0, Classes(noise=2.0), X1)],
)
def test_forgotten_scales_are_named_with_their_size(end, scale, flow, x1):
    (found,) = alarms(flow, x1=x1)
    assert (found.name, found.figure.split()[:3]) == ("input scale", ["fits", end, "times"])
    assert float(found.figure.split()[3].rstrip(",")) == pytest.approx(scale, rel=0.15)


@pytest.mark.parametrize("factor", [0.0, 0.7])
def test_a_half_trained_network_is_named(factor):
    found = alarms(lambda x, t, c: factor * FLOW(x, t, c))
    assert found[0].name == "training"
    assert all("training" in other.advice for other in found[1:])


def test_weights_that_diverged_and_averages_that_lag_are_told_apart():
    (diverged,) = alarms(FLOW, raw=lambda x, t, c: 2 * FLOW(x, t, c))
    assert (diverged.name, diverged.advice[:28]) == (
        "averaged weights",
        "the raw weights have diverge",
    )
    lags = alarms(lambda x, t, c: 0.5 * FLOW(x, t, c), raw=FLOW)[0]
    assert (lags.name, lags.advice[:22]) == ("averaged weights", "the average lags behin")
    early = alarms(lambda x, t, c: 0.0 * x, raw=lambda x, t, c: 0.5 * FLOW(x, t, c))
    assert early[0].name == "training"
    (nan,) = alarms(FLOW, raw=lambda x, t, c: x / 0)
    assert nan.figure == "loss of raw weights inf x"


def test_saturated_guidance_is_named():
    def guided(scale, x, t, c):
        return FLOW.all(x, t, c) + scale * (FLOW(x, t, c) - FLOW.all(x, t, c))

    assert not alarms(FLOW, guided=partial(guided, 1.0))
    assert [one.name for one in alarms(FLOW, guided=partial(guided, 30.0))] == ["guidance"]


def test_data_of_bytes_are_named():
    found = alarms(GaussianFlow(127.0, 60.0), x1=127 + 60 * torch.randn(COUNT, 2), cond=None)
    assert found[0].name == "data range"


def test_values_that_are_not_finite_are_findings():
    found = alarms(lambda x, t, c: FLOW(x, t, c) / expand_like(t > 0.5, x))
    assert [one.name for one in found] == ["values"]
    assert "at t from 0.02 to 0.50" in found[0].figure

    def fails_at_the_end(x, t, c):
        if bool((t == 1).any()):
            raise ValueError("t must be below 1")
        return FLOW(x, t, c)

    (end,) = alarms(fails_at_the_end)
    assert end.figure == f"finite in {6 * COUNT} states, not at t = 1"


def test_a_velocity_that_jumps_in_space_has_no_order():
    found = alarms(lambda x, t, c: FLOW(x, t, c) + 4 * torch.sign(torch.sin(1000 * x)))
    (order,) = [one for one in found if one.name == "order"]
    assert float(order.figure.split()[0]) < 1
    assert order.advice == "may follow from training: mend that first"


def test_samples_that_collapse_where_no_example_lies_are_named():
    """The fit sees times from 0.02 to 0.98: a last step to the mean shows in the samples alone."""
    mean = FLOW.means.mean(0)
    found = alarms(lambda x, t, c: FLOW(x, t, c) + 20 * expand_like(t > 0.99, x) * (mean - x))
    assert found[0].name == "samples"
    assert float(found[0].figure.split()[1]) < 0.5  # the std
    assert (
        found[0].advice == "train longer, or look at what the network does at the ends of the time"
    )
    (back,) = [one for one in found if one.name == "round trip"]
    assert back.advice == "may follow from samples: mend that first"


def test_a_velocity_that_is_rough_in_time_has_no_order():
    """80 waves over the time, whose loss is too small to be seen."""
    found = alarms(lambda x, t, c: FLOW(x, t, c) + 0.1 * expand_like(torch.sin(500 * t), x))
    assert found[0].name == "order"
    assert "the velocity jumps in time or space" in found[0].advice
    assert {one.advice for one in found[1:]} <= {"may follow from order: mend that first"}


def test_a_stiff_flow_needs_more_steps():
    """The exact flow to a narrow Gaussian contracts by 20, most of it in the last tenth."""
    flow = GaussianFlow(1.0, 0.05)
    (stiff,) = alarms(flow, x1=flow.solution(torch.randn(X0.shape, generator=seeded(1))), cond=None)
    assert stiff.name == "steps for 1 %"
    assert stiff.figure.startswith("above 32 Heun steps; error of 8 steps ")
    assert stiff.advice.startswith("the flow is stiff: find a grid with flowkit boss")


def test_a_velocity_that_is_steep_at_the_end_does_not_come_back():
    """A network that knows 16 points divides by 1 − t: data beside them are thrown far away."""
    points = torch.randn(16, 2, generator=seeded())

    def steep(x, t, c):
        s = expand_like(t, x)
        far = (x[:, None] - s[:, None] * points).square().sum(2)
        return ((-far / (2 * (1 - s) ** 2)).softmax(1) @ points - x) / (1 - s)

    near = points[torch.randint(16, (COUNT,), generator=seeded(3))]
    near += 0.02 * torch.randn(COUNT, 2, generator=seeded(4))
    values, back = alarms(steep, x1=near, cond=None)
    assert (values.name, back.name) == ("values", "round trip")
    assert "a grid that ends before t = 1 if the velocity is steep there" in back.advice


# --- sound networks ---------------------------------------------------------------------------


class OnPath:
    """The flow of the linear path as that of another path: other times and scales."""

    def __init__(self, flow, path):
        self.flow, self.path = flow, path

    def __call__(self, x, t, cond=None):
        a, b, da, db = (expand_like(c, x) for c in self.path.coefficients(t))
        own, state = a / (a + b), x / (a + b)
        v = self.flow(state, own.flatten())
        return da * (state + (1 - own) * v) + db * (state - own * v)


def sound(seed, count):
    """Sound flows by name: velocity, data, labels, path."""
    generator = seeded(seed)
    draw = partial(torch.randn, generator=generator)
    classes = Classes(seed)
    _, points, labels = classes.draw(count, generator)
    sharp = MixtureFlow(torch.ones(5), 2 * draw(5, 2), 0.05 + torch.rand(5, generator=generator))
    wide = GaussianFlow(draw(8), 0.05 + 1.5 * torch.rand(8, generator=generator))
    mixture = MixtureFlow(torch.ones(5), draw(5, 4), torch.full((5,), 0.3))
    mixed, paths = mixture.sample(count, generator), (Cosine(), VP(0, 20.0))
    found = {
        "classes": (classes, points, labels, Linear()),
        "mixture": (sharp, sharp.sample(count, generator), None, Linear()),
        "Gaussian": (wide, wide.solution(draw(count, 8)), None, Linear()),
        "images": (GaussianFlow(0.0, 1.0), draw(count, 3, 4, 4), None, Linear()),
    }
    found |= {type(p).__name__: (OnPath(mixture, p), mixed, None, p) for p in paths}
    return {name: (draw(one[1].shape), *one) for name, one in found.items()}


@pytest.mark.parametrize("name", sound(0, 32))
def test_a_sound_network_has_no_alarm(name):
    x0, flow, x1, labels, path = sound(0, COUNT)[name]
    assert alarms(flow, x0, x1, labels, path=path, raw=flow, guided=flow) == []


@pytest.mark.slow
def test_sound_networks_rarely_have_an_alarm():
    """At a rate of 1 % per network, more than 2 alarms of 36 have a probability of 0.6 %."""
    found = []
    for seed in range(1, 3):
        for count in (32, 100, 500):
            for name, (x0, flow, x1, labels, path) in sound(seed, count).items():
                told = alarms(flow, x0, x1, labels, path=path, raw=flow, guided=flow)
                found += [(seed, count, name, one) for one in told]
    assert len(found) <= 2, found


# --- a trained network ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained():
    """A network of the digits after 60 and 1000 steps, and pairs that it has not seen."""
    from flowkit.data import Digits

    data = Digits()
    data.prepare_data()
    data.setup(None)
    train, test = data.train[:], data.test[:]
    torch.manual_seed(0)
    net, kept = ResidualMLP((1, 8, 8), width=128, depth=2, num_classes=10), {}
    optimizer = torch.optim.AdamW(net.parameters(), lr=2e-3)
    for step in range(1, 1001):
        rows = torch.randint(len(train["x1"]), (128,))
        loss = flow_matching_loss(net, {"x1": train["x1"][rows], "cond": train["cond"][rows]})
        optimizer.zero_grad()
        loss["loss"].backward()
        optimizer.step()
        if step in (60, 1000):
            kept[step] = ResidualMLP((1, 8, 8), width=128, depth=2, num_classes=10).eval()
            kept[step].load_state_dict(net.state_dict())
    return kept, torch.randn(test["x1"].shape), test["x1"], test["cond"]


@pytest.mark.slow
def test_faults_of_a_trained_network_are_named(trained):
    kept, x0, x1, cond = trained
    net = kept[1000]
    assert alarms(net, x0, x1, cond, raw=net) == []
    for (name, note), velocity in broken(net, 10).items():
        if note in ("thousandths", "noise", "dropout"):  # the exact flow has these
            continue
        assert alarms(velocity, x0, x1, cond)[0].name == name, note
    assert alarms(kept[60], x0, x1, cond)[0].name == "training"
    assert alarms(net, x0, 5 * x1, cond)[0].name == "input scale"
    assert alarms(net, 2 * x0, x1, cond)[0].name == "input scale"
    names = [one.name for one in alarms(lambda x, t, c: net(x, t, 0 * c + 10), x0, x1, cond)]
    assert "conditions" in names
    wild = ResidualMLP((1, 8, 8), width=128, depth=2, num_classes=10).eval()
    wild.load_state_dict({k: v * (1 + torch.rand_like(v)) for k, v in net.state_dict().items()})
    assert alarms(net, x0, x1, cond, raw=wild)[0].name == "averaged weights"


# --- parts ------------------------------------------------------------------------------------


def test_another_scale_reads_as_the_exact_flow():
    """A network of noise 0.5 x0 and data 3 x1, so read, is the flow of x0 and x1."""
    inner, outer = GaussianFlow(3.0, 0.6), GaussianFlow(1.0, 0.2)

    def network(x, t, cond):  # the flow of noise of std 0.5
        s = expand_like(t, x)
        variance = ((1 - s) * 0.5) ** 2 + (s * 0.6) ** 2
        return 3 + (s * 0.36 - (1 - s) * 0.25) / variance * (x - 3 * s)

    x, t = torch.randn(50, 2, generator=seeded()), torch.linspace(0.05, 0.95, 50)
    read = Read(Watched(network), Reading(data_scale=3.0, noise_scale=0.5), Linear())
    torch.testing.assert_close(read(x, t), outer(x, t), rtol=1e-3, atol=1e-4)
    assert (inner(x, t) - outer(x, t)).abs().max() > 0.5


@pytest.mark.parametrize("path", [Linear(), Cosine()], ids=lambda path: type(path).__name__)
@pytest.mark.parametrize("output", ["data", "noise"])
def test_predictions_read_as_the_velocity(output, path):
    mixture = MixtureFlow(torch.ones(2), torch.tensor([[-1.0], [2.0]]), torch.full((2,), 0.5))
    flow = OnPath(mixture, path)
    convert = path.to_data if output == "data" else path.to_noise
    network = Watched(lambda x, t, cond: convert(x, t, flow(x, t)))
    x, t = torch.randn(50, 1, generator=seeded()), torch.linspace(0.05, 0.95, 50)
    read = Read(network, Reading(output=output), path)
    torch.testing.assert_close(read(x, t), flow(x, t), rtol=1e-3, atol=1e-3)


def test_the_error_of_a_mean_counts_pairs():
    """Ten equal rows of a pair tell no more than one: the error is that of the mean of 400."""
    values = torch.randn(400, generator=seeded())
    rows = values.repeat(10)
    found = mean_of(rows, torch.arange(400).repeat(10))
    assert found.value == pytest.approx(values.mean().item(), abs=1e-6)
    assert found.error == pytest.approx(values.std().item() / 20, rel=1e-3)


def test_examples_have_each_pair_once_in_each_part_of_the_time():
    x = torch.zeros(100, 1)
    examples = draw_examples(x, x + 1, None, Linear(), seeded())
    parts = ((examples.t - 0.02) / 0.96 * 11).long().reshape(11, 100)
    assert parts.sort(0).values.equal(torch.arange(11)[:, None].expand(11, 100))


def test_the_energy_distance_by_brute_force():
    a, b = torch.randn(7, 2, generator=seeded(1)), 1 + torch.randn(9, 2, generator=seeded(2))

    def far(x, y):
        return sum((p - q).square().sum().sqrt() for p in x for q in y) / len(x) / len(y)

    share = (2 * far(a, b) - far(a, a) - far(b, b)) / (2 * far(a, b))
    found = distance_of(a, b, seeded())
    assert found.share == pytest.approx(share.item(), rel=1e-5)
    assert 0 < found.mean < found.most < 1


def test_the_calls_are_counted_also_in_solves():
    network = Watched(GaussianFlow(0.0, 1.0))
    ODESampler(5, "heun")(network, torch.ones(3, 1))
    assert (network.calls, network.rows) == (10, 30)


def test_causes_come_before_what_follows():
    names = ["order", "samples", "training", "values"]
    found = ordered([Finding(name, name == "values", "", "mend") for name in names])
    assert [one.name for one in found] == ["training", "order", "samples", "values"]
    assert found[1].advice == "may follow from training: mend that first"


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ((FLOW, X0[:, :1], X1), ValueError, r"x0 must have the shape of x1, \(200, 2\), got"),
        ((FLOW, X0[:9], X1[:9]), ValueError, "the number of samples must be at least 32, got 9"),
        ((FLOW, X0, X1 / 0), ValueError, "x1 must be finite"),
        ((FLOW, X0, torch.ones_like(X1)), ValueError, "x1 must hold different samples, got 200"),
        ((lambda x, t, c: x / "a", X0, X1), ValueError, "velocity must be callable as .* TypeErr"),
        ((lambda x, t, c: t, X0, X1), ValueError, r"velocity\(x, t, cond\) must have the shape"),
        ((lambda x, t, c: 1, X0, X1), TypeError, "velocity must return a tensor, got int"),
        ((FLOW, X0, X1, LABELS[:5]), ValueError, "cond must hold one row for all samples"),
    ],
)
def test_wrong_input_is_refused(arguments, kind, message):
    with pytest.raises(kind, match=message):
        diagnose(*arguments)


@pytest.mark.parametrize("factor", [0.5, 0.7])
def test_a_factor_of_the_output_is_named_with_its_inverse(factor):
    flow, generator = GaussianFlow(2.0, 0.5), torch.Generator().manual_seed(0)
    x0 = torch.randn(500, 2, generator=generator)
    x1 = 2 + 0.5 * torch.randn(500, 2, generator=generator)
    first = diagnose(lambda x, t, cond: factor * flow(x, t), x0, x1)[0]
    assert first.name == "training"
    found = float(first.advice.removeprefix("multiply the output by ").partition(":")[0])
    assert found == pytest.approx(1 / factor, rel=0.02)
