import copy
import math
from contextlib import contextmanager
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import nn

from broadsheet.errors import InvalidInput
from broadsheet.generative.multiplicative_diffusion import (
    OFFICIAL,
    AdditiveScoreModel,
    ExponentiatedGradient,
    GBMProcess,
    MultiplicativeScoreModel,
    additive_step,
    class_average_start,
    dale_init_,
    dale_step,
    denoise,
    log_likelihood,
    mirror_langevin,
    sample,
    unconstrained_step,
    weight_report,
)
from broadsheet.generative.multiplicative_diffusion.denoising import draw
from broadsheet.nn.distances import fit_lognormal
from broadsheet.nn.progress import SILENT, Progress, Task
from broadsheet.nn.score_networks import ScoreMLP
from broadsheet.nn.sde import euler_maruyama
from broadsheet.nn.seeding import generator, seeded

M, V = 0.3, 0.25  # a log-normal p_0: mean and variance of log x


class Exact(nn.Module):
    """The true noise estimate for a log-normal p_0, from the standardized input that the model feeds its net."""

    def __init__(self, process):
        super().__init__()
        self.process = process
        self.idle = nn.Parameter(torch.zeros(1))

    def forward(self, x, t):
        t = t.reshape(-1, *[1] * (x.ndim - 1))
        return x * self.process.sigma * t.sqrt() / (V + self.process.sigma**2 * t).sqrt()


def exact_model(sigma=0.8, mu=None, dtype=torch.float32):
    process = GBMProcess(mu, sigma)
    model = MultiplicativeScoreModel(Exact(process), process).to(dtype)
    model.mean = torch.tensor([M], dtype=dtype)
    model.std = torch.tensor([math.sqrt(V)], dtype=dtype)
    return model


def lognormal(n, d=1, seed=0, dtype=torch.float32):
    return torch.exp(M + math.sqrt(V) * torch.randn(n, d, generator=generator(seed), dtype=dtype))


@pytest.mark.parametrize("mu", [None, 0.0, -0.7])
def test_conditional_score_is_x_times_the_gradient_of_the_density(mu):
    process = GBMProcess(mu, 0.8)
    x0, t = lognormal(20, 3, dtype=torch.float64), torch.linspace(0.05, 1, 20, dtype=torch.float64)
    x = process.sample_forward(x0, t, generator=generator(1)).requires_grad_()
    (grad,) = torch.autograd.grad(process.log_prob(x, x0, t).sum(), x)
    torch.testing.assert_close(process.conditional_score(x, x0, t), x * grad, atol=1e-6, rtol=1e-6)
    law = torch.distributions.LogNormal(x0.log() + process.log_drift * t[:, None], process.sigma * t.sqrt()[:, None])
    torch.testing.assert_close(process.log_prob(x, x0, t), law.log_prob(x).sum(1))


@pytest.mark.parametrize("mu", [None, 0.9, -0.7])
def test_forward_noising_solves_the_stochastic_equation(mu):
    process, n = GBMProcess(mu, 0.8), 40000
    t, z = torch.tensor([0.2, 0.9], dtype=torch.float64), torch.tensor([[-1.0], [2.0]], dtype=torch.float64)
    x0 = torch.tensor([[0.5], [3.0]], dtype=torch.float64)
    m = 0.32 if mu is None else mu
    written_out = x0 * torch.exp((m - 0.32) * t[:, None] + 0.8 * t[:, None] ** 0.5 * z)
    torch.testing.assert_close(process.sample_forward(x0, t, z), written_out)
    # the same law as dX = mu X dt + sigma X dW, integrated in small steps
    slow = euler_maruyama(
        lambda x, _: m * x,
        lambda x, _: 0.8 * x,
        torch.full((n, 1), 1.5),
        [i / 200 for i in range(201)],
        generator=generator(0),
    ).log()
    fast = process.sample_forward(torch.full((n, 1), 1.5), 1.0, generator=generator(1)).log()
    assert float(slow.mean() - fast.mean()) == pytest.approx(0, abs=4 * 0.8 * math.sqrt(2 / n) + 0.005)
    assert float(slow.std() / fast.std()) == pytest.approx(1, abs=0.02)


def test_loss_is_zero_at_the_true_score_of_a_point():
    process = GBMProcess()

    class Point(nn.Module):
        def forward(self, x, t):
            return process.conditional_score(x, torch.full_like(x, 1.7), t) / x

    model = MultiplicativeScoreModel(Point(), process, predicts="score")
    loss = model.loss(torch.full((50, 2), 1.7, dtype=torch.float64), generator=generator(0))
    assert float(loss) < 1e-20


def test_a_trained_net_finds_the_lognormal_optimum():
    with seeded(0):
        model = MultiplicativeScoreModel(ScoreMLP(1, 32, 2), GBMProcess())
    x0 = lognormal(8192)
    # the data's own moments are the planted truth: what is measured is the training, not the luck of the draw
    mean, var = float(x0.log().mean()), float(x0.log().var())
    model.fit(list(x0.split(1024)), 400, lr=1e-2, ema=0.98)
    y = torch.linspace(-1, 1.6, 40)[:, None]
    gaps, sizes = [], []
    for t in (0.1, 0.3, 0.6, 1.0):
        optimum = -1 - (y - mean) / (var + 0.64 * t)
        gaps.append((model.hyvarinen_score(y.exp(), t) - optimum).square().mean())
        sizes.append((optimum + 1).square().mean())
    # of the score of log x, h + 1: a constant -1 would flatter the ratio
    assert float((sum(gaps) / sum(sizes)).sqrt().detach()) < 0.05


# The equations of the paper and its official code, written out once more and on their own: raw x, net = Stein score.


class RawScore(nn.Module):
    """Some smooth score of raw x, the same for the library and the transcription."""

    def forward(self, x, t):
        return (-1.3 - 0.7 * x.log() + 0.2 * torch.sin(3 * x) * t[:, None]) / x


def written_out_loss(net, x0, k, z, levels, mu, sigma, shift_target):
    xt = x0 * torch.exp((mu - 0.5 * sigma**2) * (k / levels) + sigma * (k / levels) ** 0.5 * z)
    tau = (k + shift_target) / levels
    s = net(xt, (k / levels)[:, 0])
    residual = sigma**2 * tau * xt * s + xt.log() - x0.log() - mu * tau + 1.5 * sigma**2 * tau
    return (residual**2).sum(1).mean()


@pytest.mark.parametrize("mu", [0.32, 0.1, -0.4])
def test_loss_is_the_papers_with_one_time_index(mu):
    net, process = RawScore(), GBMProcess(mu, 0.8)
    model = MultiplicativeScoreModel(net, process, predicts="score")
    x0, z = lognormal(64, 3, dtype=torch.float64), torch.randn(64, 3, dtype=torch.float64, generator=generator(9))
    k = torch.randint(1, 1000, (64, 1), generator=generator(8)).double()
    ours = model.loss(x0, k[:, 0] / 1000, z)
    torch.testing.assert_close(ours, written_out_loss(net, x0, k, z, 1000, mu, 0.8, 0), rtol=1e-6, atol=1e-6)
    # the official loop's second index is another number, by something of the order of the target's shift
    official = written_out_loss(net, x0, k, z, 1000, mu, 0.8, 1)
    assert 1e-4 < abs(float(official / ours - 1)) < 0.1


def test_the_second_time_index_biases_the_optimum_by_one_over_k():
    # one data point: the least squares solution of the residual is known in closed form
    sigma, levels = 0.8, 1000
    for k in (1, 2, 10, 500):
        for shift, expected in ((0, -1.0), (1, -k / (k + 1))):
            z = torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None]
            slope = torch.tensor(0.0, dtype=torch.float64, requires_grad=True)

            class Slope(nn.Module):
                def forward(self, x, t, slope=slope, k=k):
                    # x s = -1 + slope * (log x - log x0) / (sigma^2 t), the truth being slope = -1
                    return (-1 + slope * x.log() / (sigma**2 * k / levels)) / x

            times = torch.full((9, 1), float(k), dtype=torch.float64)
            loss = written_out_loss(Slope(), torch.ones_like(z), times, z, levels, sigma**2 / 2, sigma, shift)
            (g,) = torch.autograd.grad(loss, slope, create_graph=True)
            (curvature,) = torch.autograd.grad(g, slope)
            assert float((-g / curvature).detach()) == pytest.approx(expected, rel=1e-9)


WRITTEN_OUT_SETTINGS = [
    ("official-mnist", "dale", 6.165e-4, 1, 0.995, 0),
    ("official-mnist", "unconstrained", 1.438e-4, 4, 0.995, 0),
    ("official-cifar10", "dale", 1.142e-4, 6, 0.9995, 25),
    ("official-cifar10", "unconstrained", 1.438e-4, 5, 0.9995, 25),
    ("sde", "dale", None, 1, 1.0, 0),
    ("sde", "unconstrained", None, 1, 1.0, 0),
]


@pytest.mark.parametrize(("preset", "method", "d", "repeats", "anneal", "extra"), WRITTEN_OUT_SETTINGS)
@pytest.mark.parametrize("mu", [0.32, -0.2])
def test_samplers_are_the_papers_equations(preset, method, d, repeats, anneal, extra, mu):
    levels, sigma, net = 60, 0.8, RawScore()
    model = MultiplicativeScoreModel(net, GBMProcess(mu, sigma), predicts="score")
    start = lognormal(6, 2, seed=5, dtype=torch.float64)
    ours = sample(model, (6, 2), method, levels, preset=preset, x_T=start, generator=generator(3), keep_negative=True)

    d = 1 / levels if d is None else d
    noise, x, a = generator(3), start, 1.0

    def update(x, k, factor):
        z = torch.randn(x.shape, generator=noise, dtype=x.dtype)
        h = x * net(x, torch.full((6,), k / levels, dtype=x.dtype))
        if method == "dale":
            return x * torch.exp(d * sigma**2 * h - d * (mu - 1.5 * sigma**2) + factor * math.sqrt(d) * sigma * z)
        return x * (1 + 2 * d * sigma**2 - d * mu + d * sigma**2 * h + factor * math.sqrt(d) * sigma * z)

    for k in range(levels, 0, -1):
        for i in range(repeats):
            x = update(x, k, 0.0 if k == 1 and i == repeats - 1 else a)  # ours ends without noise
        a *= anneal
    for _ in range(extra):
        x = update(x, 1, 0.0)  # the denoisers: the same steps, noiseless, at the lowest trained level
    torch.testing.assert_close(ours, x, rtol=1e-6, atol=1e-6)


def test_training_times_are_uniform_in_the_logarithm_or_in_themselves():
    x0 = torch.ones(20000, 1)
    log_times, _ = draw(x0, 2.0, times="log", generator=generator(0))
    even_times, _ = draw(x0, 2.0, times="uniform", generator=generator(0))
    for t, law in (
        (log_times, stats.loguniform(0.002, 2.0)),
        (even_times, stats.uniform(0.002, 1.998)),
    ):
        assert stats.kstest(t.double().numpy(), law.cdf).pvalue > 0.01
    with pytest.raises(InvalidInput, match="times='even'"):
        draw(x0, 1.0, times="even")


@pytest.mark.parametrize(("cosine", "last"), [(True, 0.0), (False, 1e-2)])
def test_the_learning_rate_falls_to_zero_if_wanted(cosine, last):
    model = MultiplicativeScoreModel(ScoreMLP(2, 8, 1), GBMProcess())
    adam = torch.optim.Adam(model.parameters(), lr=1e-2)
    model.fit([lognormal(32, 2)], 5, optimizer=adam, cosine=cosine)
    assert adam.param_groups[0]["lr"] == pytest.approx(last, abs=1e-12)


def test_fit_leaves_the_averaged_weights_in_the_model():
    data, steps = list(lognormal(256, 2).split(64)), 12
    fits = {}
    for ema in (None, 0.9):
        with seeded(0):
            model = MultiplicativeScoreModel(ScoreMLP(2, 8, 1), GBMProcess())
        start = copy.deepcopy(model.state_dict())
        seen = []
        adam = torch.optim.Adam(model.parameters(), lr=1e-2)
        adam.register_step_post_hook(lambda *_, m=model, s=seen: s.append([p.detach().clone() for p in m.parameters()]))
        model.fit(data, steps, ema=ema, optimizer=adam, cosine=False)
        fits[ema] = (start, seen, [p.detach() for p in model.parameters()])
    _, seen, last = fits[None]
    for a, b in zip(last, seen[-1], strict=True):
        torch.testing.assert_close(a, b)
    start, seen, averaged = fits[0.9]
    for i, (name, _) in enumerate(MultiplicativeScoreModel(ScoreMLP(2, 8, 1), GBMProcess()).named_parameters()):
        expected = start[name].clone()
        for parameters in seen:
            expected = 0.9 * expected + 0.1 * parameters[i]
        torch.testing.assert_close(averaged[i], expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-12)])
def test_dale_step_is_the_additive_step_in_log_space(dtype, tolerance):
    g = generator(0)
    x, h, z = (torch.randn(500, generator=g, dtype=dtype) for _ in range(3))
    x = x.exp()
    for mu in (0.32, 0.0, 0.9):
        ours = dale_step(x, h, 1e-3, mu, 0.8, z)
        theirs = additive_step(x.log(), h + 1, 1e-3, 0.8, z, mu - 0.32).exp()
        torch.testing.assert_close(ours, theirs, atol=tolerance, rtol=tolerance)


def test_the_sampler_takes_dale_steps():
    model = exact_model(mu=0.1, dtype=torch.float64)
    start = lognormal(5, dtype=torch.float64)
    ours = sample(model, (5, 1), steps=10, x_T=start, generator=generator(4))
    g, x = generator(4), start
    for k in range(10, 0, -1):
        z = torch.randn(x.shape, generator=g, dtype=x.dtype) * (k > 1)
        x = dale_step(x, model.hyvarinen_score(x, k / 10), 0.1, 0.1, 0.8, z)
    torch.testing.assert_close(ours, x, rtol=1e-12, atol=1e-12)


@settings(deadline=None, max_examples=25)
@given(steps=st.sampled_from([1, 2, 7, 100, 1000]), scale=st.floats(-1e6, 1e6), seed=st.integers(0, 100))
def test_dale_never_leaves_the_positive_numbers(steps, scale, seed):
    class Wild(nn.Module):
        def forward(self, x, t):
            return scale * torch.ones_like(x)

    x = sample(MultiplicativeScoreModel(Wild()), (4, 2), steps=steps, seed=seed)
    assert bool((x > 0).all())
    assert bool(torch.isfinite(x).all())


def test_unconstrained_approaches_dale_pathwise_with_strong_order_one_half():
    model = exact_model(dtype=torch.float64)
    p, n = model.process, 2048
    fine = torch.randn(n, 400, 1, generator=generator(5), dtype=torch.float64) / math.sqrt(n)
    gaps, sizes = [], [16, 32, 64, 128, 256]
    for steps in sizes:
        z = fine.reshape(steps, n // steps, 400, 1).sum(1) * math.sqrt(steps)
        a = b = lognormal(400, dtype=torch.float64)
        for i, k in enumerate(range(steps, 0, -1)):
            t, d = k / steps, 1 / steps
            a = dale_step(a, model.hyvarinen_score(a, t), d, p.drift, p.sigma, z[i])
            b = unconstrained_step(b, model.hyvarinen_score(b.clamp_min(1e-300), t), d, p.drift, p.sigma, z[i])
        gaps.append(float((a - b).abs().mean()))
    slope = np.polyfit(np.log(sizes), np.log(gaps), 1)[0]
    assert -0.7 < slope < -0.35


def test_one_step_difference_is_of_first_order_in_the_step():
    x, h, z = (torch.randn(1000, generator=generator(i), dtype=torch.float64) for i in range(3))
    x, ds = x.exp(), [10.0**-k for k in range(3, 8)]
    gaps = [float((dale_step(x, h, d, 0.32, 0.8, z) - unconstrained_step(x, h, d, 0.32, 0.8, z)).norm()) for d in ds]
    assert np.polyfit(np.log(ds), np.log(gaps), 1)[0] == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize(("method", "steps"), [("dale", 1000), ("unconstrained", 1000), ("ode", 40)])
@pytest.mark.parametrize("mu", [None, 0.0])
def test_reverse_samples_recover_the_lognormal(method, steps, mu):
    n = 20000
    y = sample(exact_model(mu=mu), (n, 1), method, steps, seed=1).log()
    assert abs(float(y.mean()) - M) / math.sqrt(V / n) < 4
    # the grid's own bias of the variance, of order sigma^2 / steps, is left room for beside four standard errors
    assert abs(float(y.var()) - V) < 4 * V * math.sqrt(2 / n) + 0.64 / 1000


def test_the_flow_ends_in_a_denoising_step():
    model = exact_model(mu=0.1, dtype=torch.float64)
    path = sample(model, (50, 1), "ode", 10, x_T=lognormal(50, dtype=torch.float64), trajectory=True)
    assert path.times[-2] == pytest.approx(1 / 1000)
    torch.testing.assert_close(path.trajectory[-1], denoise(model, path.trajectory[-2], 1 / 1000), rtol=1e-9, atol=0)
    assert not torch.allclose(path.trajectory[-1], path.trajectory[-2])


def test_implicit_and_explicit_loss_differ_by_a_constant():
    x = lognormal(200_000, dtype=torch.float64)
    t = 0.5
    x = GBMProcess().sample_forward(x, t, generator=generator(7))
    var = V + 0.32
    gaps = []
    for a, b in [(0.4, 0.1), (0.6, 0.0), (0.7, -0.1)]:

        class Linear(nn.Module):
            def forward(self, x, t, a=a, b=b):
                return (-1 - a * (x.log() - M) / var + b) / x

        model = MultiplicativeScoreModel(Linear(), GBMProcess(), predicts="score")
        truth = (-1 - (x.log() - M) / var) / x
        explicit = model.esm_loss(x, t, truth) / 2
        gaps.append(float((model.implicit_loss(x, t) - explicit).detach()))
    # the constant is -E h^2 / 2; what is left is Monte Carlo error of 200000 points
    assert max(gaps) - min(gaps) < 5e-3


def test_implicit_loss_is_hyvarinens_2007_formula():
    model = MultiplicativeScoreModel(ScoreMLP(1).double(), GBMProcess()).double()
    x = lognormal(50, dtype=torch.float64).requires_grad_()
    s = model.stein_score(x, 0.4)
    (ds,) = torch.autograd.grad(s.sum(), x)
    expected = (2 * x * s + x**2 * ds + 0.5 * x**2 * s**2).sum(1).mean()
    torch.testing.assert_close(model.implicit_loss(x, 0.4), expected)


def test_likelihood_of_a_lognormal_is_exact():
    model = exact_model(dtype=torch.float64)
    x = lognormal(50, 2, dtype=torch.float64)
    noised = math.sqrt(V + 0.64 / 1000)  # the flow stops at T / 1000
    truth = torch.distributions.LogNormal(M, noised).log_prob(x).sum(1)
    exact = log_likelihood(model, x, steps=200)
    torch.testing.assert_close(exact.log_prob, truth, atol=1e-3, rtol=1e-3)
    # the Jacobian is diagonal here, where Rademacher probes give the trace without error
    rough = log_likelihood(model, x, steps=200, divergence="hutchinson", n_probes=2)
    torch.testing.assert_close(rough.log_prob, exact.log_prob)


@pytest.mark.parametrize("log", [False, True])
def test_likelihood_of_the_additive_model_is_exact_on_a_gaussian(log):
    sigma = 1.5
    model = AdditiveScoreModel(Exact(GBMProcess(sigma=sigma)), sigma, log=log).double()
    model.mean, model.std = torch.tensor([M], dtype=torch.float64), torch.tensor([math.sqrt(V)], dtype=torch.float64)
    x = lognormal(50, 2, dtype=torch.float64)
    law = (torch.distributions.LogNormal if log else torch.distributions.Normal)(M, math.sqrt(V + sigma**2 / 1000))
    found = log_likelihood(model, x, steps=200)
    torch.testing.assert_close(found.log_prob, law.log_prob(x).sum(1), atol=1e-3, rtol=1e-3)
    assert found.nats_per_value == pytest.approx(-float(law.log_prob(x).mean()), abs=1e-3)


def test_denoiser_is_the_posterior_mean_of_log_x():
    model = exact_model(mu=0.1, dtype=torch.float64)
    x, t = lognormal(20, dtype=torch.float64), 0.6
    noise = 0.64 * t
    posterior = M + V / (V + noise) * (x.log() - model.process.log_drift * t - M)
    # the net is exact in the deviation from the mean
    torch.testing.assert_close(denoise(model, x, t).log(), posterior)


def test_terminal_law_and_class_averages():
    x = lognormal(50000)
    law = GBMProcess().terminal(x)
    assert float(law.mean) == pytest.approx(M, abs=0.02)
    assert float(law.std) ** 2 == pytest.approx(V + 0.64, abs=0.02)
    images = lognormal(40, 48).reshape(40, 3, 4, 4)
    assert GBMProcess().terminal(images).mean.shape == (3, 1, 1)
    start = class_average_start(images, torch.arange(40) % 2, 5, GBMProcess(), generator(0))
    assert start.shape == (5, 3, 4, 4)
    assert bool((start > 0).all())


def test_mirror_langevin_samples_a_gamma_law():
    x = mirror_langevin(lambda x: 2 / x - 1, torch.ones(20000), 400, 0.01, generator=generator(0))  # Gamma(3, 1)
    assert float(x.mean()) == pytest.approx(3, abs=0.08)
    assert float(x.var()) == pytest.approx(3, abs=0.25)


def test_presets_trajectory_and_plot():
    model = exact_model()
    path = sample(model, (6, 1), steps=12, preset="official", trajectory=True)
    assert path.trajectory.shape == (13, 6, 1)
    assert path.calls == 12
    assert OFFICIAL["cifar10", "dale"].inner == 6
    path.plot()
    ode = sample(model, (6, 1), "ode", 10, trajectory=True)
    assert ode.calls == 21
    assert len(ode.times) == len(ode.trajectory)
    extra = sample(model, (6, 1), steps=5, inner=2, denoise_steps=3, trajectory=True)
    assert extra.calls == 13
    assert bool((sample(model, (6, 1), steps=9) == sample(model, (6, 1), steps=9)).all())


def test_unconstrained_warns_when_it_goes_negative():
    model = exact_model(sigma=3.0)
    with pytest.warns(UserWarning, match=r"negative at step"):
        x = sample(model, (500, 1), "unconstrained", 5)
    assert bool((x > 0).all())
    with pytest.warns(UserWarning, match="negative"):
        assert bool((sample(model, (500, 1), "unconstrained", 5, keep_negative=True) < 0).any())


def test_bad_input_is_named():
    process = GBMProcess()
    model = exact_model()
    for bad in ({"sigma": 0.0}, {"T": -1.0}, {"sigma": math.nan}):
        with pytest.raises(InvalidInput):
            GBMProcess(**bad)
    with pytest.raises(InvalidInput, match=r"1 of 3 values <= 0.*shift"):
        process.sample_forward(torch.tensor([1.0, 0.0, 2.0]), 0.5)
    with pytest.raises(InvalidInput, match="255"):
        model.loss(torch.ones(3, 1, dtype=torch.uint8))
    with pytest.raises(InvalidInput, match="t > 0"):
        model.hyvarinen_score(torch.ones(2, 1), 0.0)

    class Wider(nn.Module):
        def forward(self, x, t):
            return torch.cat([x, x], 1)

    with pytest.raises(InvalidInput, match="shape"):
        MultiplicativeScoreModel(Wider(), process).hyvarinen_score(torch.ones(4, 2), 0.5)
    with pytest.raises(InvalidInput, match="method"):
        sample(model, (2, 1), "ums")
    with pytest.raises(InvalidInput, match="no meaning"):
        sample(model, (2, 1), "ode", denoise_steps=3)
    with pytest.raises(InvalidInput, match="used up"):
        model.fit(iter([]), 3)
    with pytest.raises(InvalidInput, match="preset"):
        sample(model, (2, 1), preset="best")
    with pytest.raises(InvalidInput, match="values <= 0"):
        sample(model, (2, 1), x_T=torch.tensor([[1.0], [-1.0]]))
    with pytest.raises(InvalidInput, match="NaN"):
        process.sample_forward(torch.tensor([math.nan]), 0.5)
    with pytest.warns(UserWarning, match="sigma of about"):
        model.set_statistics(torch.exp(5 * torch.randn(100, 1, generator=generator(0))))

    class Broken(nn.Module):
        def forward(self, x, t):
            return x * math.nan

    with pytest.raises(InvalidInput, match=r"level 4 of 4.*norm"):
        sample(MultiplicativeScoreModel(Broken()), (2, 1), steps=4)


def test_shift_floor_and_bounds_are_undone():
    model = exact_model()
    model.shift, model.bounds = 1.0, (0.0, 1.0)
    x = sample(model, (50, 1), steps=5)
    assert 0 <= float(x.min()) <= float(x.max()) <= 1
    model.shift, model.floor = 0.0, 1e-3
    assert math.isfinite(float(model.loss(torch.zeros(4, 1), generator=generator(0))))


def test_save_and_load(tmp_path):
    with seeded(0):
        model = MultiplicativeScoreModel({"name": "ScoreMLP", "dim": 2}, GBMProcess(0.1, 1.5), shift=0.5)
    model.set_statistics(lognormal(100, 2))
    model.save_pretrained(tmp_path)
    again = MultiplicativeScoreModel.from_pretrained(tmp_path)
    assert again.process == model.process
    assert again.shift == 0.5
    torch.testing.assert_close(sample(again, (5, 2), steps=5), sample(model, (5, 2), steps=5), rtol=0, atol=0)


@pytest.mark.parametrize("log", [False, True])
def test_the_additive_model_is_saved_and_loaded(tmp_path, log):
    with seeded(0):
        model = AdditiveScoreModel({"name": "ScoreMLP", "dim": 2}, 1.5, log=log)
    model.fit([lognormal(64, 2)], steps=3)
    model.save_pretrained(tmp_path)
    again = AdditiveScoreModel.from_pretrained(tmp_path)
    assert (again.sigma, again.log) == (1.5, log)
    assert again.mean.shape == (2,)
    torch.testing.assert_close(again.sample((5, 2), steps=5), model.sample((5, 2), steps=5), rtol=0, atol=0)


@pytest.mark.parametrize("model", [MultiplicativeScoreModel, partial(AdditiveScoreModel, sigma=1.0)])
def test_what_cannot_be_rebuilt_is_not_saved(tmp_path, model):
    with pytest.raises(InvalidInput, match="give net as a dict"):
        model(nn.Linear(2, 2)).save_pretrained(tmp_path / "new")
    assert not (tmp_path / "new").exists()
    with pytest.raises(InvalidInput, match="'Resnet': expected one of ResidualMLP, ScoreMLP, ScoreUNet"):
        model({"name": "Resnet"})


class StopsAt(Progress):
    """Presses Ctrl-C when so many steps are done."""

    def __init__(self, steps):
        self.steps = steps

    @contextmanager
    def task(self, description, total=None):
        task = Task()
        left = iter([*[None] * self.steps, KeyboardInterrupt()])

        def advance(n=1, **numbers):
            if (stop := next(left)) is not None:
                raise stop

        task.advance = advance
        yield task


def test_training_resumes_to_the_same_weights(tmp_path):
    data = list(lognormal(256, 2).split(64))

    def train(folder=None, progress=SILENT):
        with seeded(0):
            model = MultiplicativeScoreModel(ScoreMLP(2, 16, 1), GBMProcess())
        return model, model.fit(data, 20, lr=1e-2, ema=0.9, checkpoint=folder, seed=3, progress=progress)

    whole, _ = train()
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "c", StopsAt(9))
    resumed, report = train(tmp_path / "c")
    assert report.resumed_from == 9
    for a, b in zip(whole.parameters(), resumed.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_additive_model_on_log_x_is_the_same_model():
    with seeded(0):
        net = ScoreMLP(2)
    ours = MultiplicativeScoreModel(net, GBMProcess(sigma=1.3))
    theirs = AdditiveScoreModel(net, 1.3, log=True)
    x0 = lognormal(64, 2)
    ours.set_statistics(x0)
    theirs.set_statistics(x0)
    t, z = torch.rand(64, generator=generator(0)) + 0.01, torch.randn(64, 2, generator=generator(1))
    torch.testing.assert_close(ours(x0, t, z), theirs(x0, t, z))
    a, b = sample(ours, (30, 2), steps=20, seed=4), theirs.sample((30, 2), 20, seed=4)
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def train_network(optimizer_of, steps=1000):
    with seeded(0):
        net = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 1))
    dale_init_(net, generator=generator(1))
    before = copy.deepcopy(net)
    x = torch.randn(64, 4, generator=generator(2))
    y = (x[:, :1] * x[:, 1:2]).sign()
    optimizer = optimizer_of(net.parameters())
    for _ in range(steps):
        optimizer.zero_grad()
        loss = (net(x) - y).square().mean()
        loss.backward()
        optimizer.step()
    return before, net, loss.item()


def test_exponentiated_gradient_learns_and_never_flips_a_sign():
    before, net, loss = train_network(lambda p: ExponentiatedGradient(p, 0.3))
    _, other, _ = train_network(lambda p: torch.optim.SGD(p, 0.3))
    report = weight_report({"EG": net, "SGD": other}, initial=before)
    assert loss < 0.6
    assert report.sign_flips["EG"] == 0
    assert report.sign_flips["SGD"] > 0
    assert report.to_frame().shape == (2, 5)
    report.plot()


def test_exponentiated_gradient_is_gradient_descent_on_log_w_to_first_order():
    for lr in (1e-3, 1e-4):
        w = torch.tensor([0.5, -2.0, 3.0], dtype=torch.float64, requires_grad=True)
        start = w.detach().clone()
        ExponentiatedGradient([w], lr).zero_grad()
        (w**3).sum().backward()
        grad = 3 * start**2
        ExponentiatedGradient([w], lr).step()
        torch.testing.assert_close(w.detach().abs().log() - start.abs().log(), -lr * start.sign() * grad)
        # dL/dlog|w| = w dL/dw: one step changes the loss as a step of size lr / |w| in log|w| does
        change = (w.detach() ** 3).sum() - (start**3).sum()
        assert float(change / -(lr * start.abs() * grad**2).sum()) == pytest.approx(1, abs=60 * lr)


def test_optimizer_contract():
    w = nn.Parameter(torch.tensor([1.0, -1.0]))
    optimizer = ExponentiatedGradient([{"params": [w], "lr": 0.5}], lr=0.1)

    def closure():
        optimizer.zero_grad()
        loss = (w**2).sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 2
    torch.testing.assert_close(w.detach(), torch.tensor([1.0, -1.0]) * math.exp(-1))
    other = ExponentiatedGradient([w], lr=0.1)
    other.load_state_dict(optimizer.state_dict())
    assert other.param_groups[0]["lr"] == 0.5
    w.grad = torch.tensor([1e9, 1e9])
    optimizer.step()
    assert w.detach().sign().tolist() == [1, -1]
    with pytest.warns(UserWarning, match="cannot move"):
        ExponentiatedGradient([nn.Parameter(torch.zeros(2))])
    crossing = nn.Parameter(torch.tensor([1.0]))
    crossing.grad = torch.tensor([3.0])
    ExponentiatedGradient([crossing], 1.0, dale=False).step()
    assert float(crossing) == -2


def test_dale_init_is_lognormal():
    net = dale_init_(nn.Linear(200, 200), 0.7, generator(0))
    fit = fit_lognormal(net.weight.abs())
    assert fit.std == pytest.approx(0.7, abs=0.02)
    assert fit.kolmogorov < 0.02
    assert float(net.weight.square().mean()) == pytest.approx(1 / 200, rel=0.1)
