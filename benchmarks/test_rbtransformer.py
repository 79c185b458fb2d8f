"""Band entropies of a whole stack against the published loop; the forward pass against braindecode models."""

import math

import numpy as np
import pytest
import torch
from scipy.signal import butter, lfilter

from broadsheet.recordings import EMOTION_BANDS, RBTransformerWindows, band_differential_entropy

memory = pytest.importorskip("broadsheet.lab.memory")

WINDOWS = np.random.default_rng(0).normal(size=(60, 32, 512))
SFREQ = 128.0


def published_loop(windows):
    """Window by window, channel by channel, band by band, with the filter designed anew each time."""
    out = np.empty((*windows.shape[:2], 4), np.float32)
    for i, window in enumerate(windows):
        window = (window - window.mean()) / window.std()
        for j, series in enumerate(window):
            for k, (low, high) in enumerate(EMOTION_BANDS.values()):
                b, a = butter(5, [2 * low / SFREQ, 2 * high / SFREQ], btype="band")
                out[i, j, k] = 0.5 * math.log2(2 * math.pi * math.e * np.var(lfilter(b, a, series)))
    return out


@pytest.mark.benchmark(group="rbtransformer: entropies of 60 windows, 32 channels, 4 s")
class TestEntropy:
    def test_ours(self, benchmark):
        result = benchmark.pedantic(band_differential_entropy, (WINDOWS, SFREQ), rounds=5, warmup_rounds=1)
        np.testing.assert_allclose(result, published_loop(WINDOWS), atol=1e-4)
        benchmark.extra_info["peak_mib"] = memory.peak(lambda: band_differential_entropy(WINDOWS, SFREQ))[1]

    def test_ours_torch(self, benchmark):
        model = RBTransformerWindows(32, 2, 512, SFREQ).eval()
        x = torch.from_numpy(WINDOWS.astype(np.float32))
        with torch.no_grad():
            benchmark.pedantic(model.tokens, (x,), rounds=5, warmup_rounds=1)

    def test_published_loop(self, benchmark):
        benchmark.pedantic(published_loop, (WINDOWS,), rounds=3)
        benchmark.extra_info["peak_mib"] = memory.peak(lambda: published_loop(WINDOWS))[1]

    def test_torcheeg(self, benchmark):
        transforms = pytest.importorskip("torcheeg.transforms", exc_type=ImportError)
        take = transforms.BandDifferentialEntropy(
            sampling_rate=128, band_dict={k: list(v) for k, v in EMOTION_BANDS.items()}
        )
        benchmark.pedantic(lambda: [take(eeg=window)["eeg"] for window in WINDOWS], rounds=3)

    def test_mne_features(self, benchmark):
        features = pytest.importorskip("mne_features.univariate")
        edges = np.array([4.0, 8.0, 14.0, 31.0, 49.0])
        take = features.compute_pow_freq_bands
        benchmark.pedantic(lambda: [take(SFREQ, window, freq_bands=edges) for window in WINDOWS], rounds=3)


@pytest.mark.benchmark(group="rbtransformer: forward pass of 64 raw windows, 32 channels, 4 s")
class TestForward:
    x = torch.from_numpy(np.random.default_rng(1).normal(size=(64, 32, 512)).astype(np.float32))

    def _run(self, benchmark, model):
        model.eval()
        with torch.no_grad():
            result = benchmark.pedantic(model, (self.x,), rounds=5, warmup_rounds=1)
        assert result.shape == (64, 2)

    def test_ours(self, benchmark):
        self._run(benchmark, RBTransformerWindows(n_chans=32, n_outputs=2, n_times=512, sfreq=SFREQ))

    @pytest.mark.parametrize("name", ["EEGNet", "EEGConformer"])
    def test_braindecode(self, benchmark, name):
        models = pytest.importorskip("braindecode.models")
        self._run(benchmark, getattr(models, name)(n_chans=32, n_outputs=2, n_times=512, sfreq=SFREQ))
