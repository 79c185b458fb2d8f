"""The microscope: its numbers are those of the methods on whole matrices, and training does not feel it."""

import copy
import math

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment
from torch import nn

from broadsheet.errors import InvalidInput
from broadsheet.geometry import TrainingMicroscope
from broadsheet.geometry.diffusion_spectral_entropy import (
    BandwidthWarning,
    diffusion_spectral_entropy,
    diffusion_spectral_mutual_information,
)
from broadsheet.geometry.diffusion_spectral_entropy.information import reference_clusters
from broadsheet.geometry.neural_collapse import collapse_metrics, collapse_report
from broadsheet.nn.small_classifiers import mlp, small_cnn
from broadsheet.nn.training import fit


def random(seed=0):
    return torch.Generator().manual_seed(seed)


def net(seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Dropout(0.4), nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 3))


def samples(n=90, seed=0):
    labels = torch.arange(n) % 3
    return torch.randn(n, 6, generator=random(seed)) + 2 * torch.eye(6)[labels], labels


def loader(n=90, batch=17, seed=0):
    x, y = samples(n, seed)
    return list(zip(x.split(batch), y.split(batch), strict=True))


def test_numbers_are_those_of_the_methods_on_whole_matrices():
    model, other = net().eval(), net(1).eval()
    scope = TrainingMicroscope(
        model, loader(), ["1", "4"], head="5", reference=other, sigma=2.0, max_points=40, input_clusters=4
    )
    looks = {look.layer: look.values for look in scope.look(0)}
    x, y = samples()
    kept = scope._kept
    assert kept is not None and len(kept) == 40
    with torch.no_grad():
        for name, layer in {"1": 2, "4": 5}.items():
            h, g = model[:layer](x), other[:layer](x)
            found = looks[name]
            assert found["dse"] == pytest.approx(float(diffusion_spectral_entropy(h[kept].double().numpy(), 2.0)))
            known = diffusion_spectral_mutual_information(h[kept].double().numpy(), y[kept].numpy(), sigma=2.0)
            assert found["dsmi_labels"] == pytest.approx(float(known))
            clusters = reference_clusters(x[kept].double().numpy(), False, 4, 0)
            known = diffusion_spectral_mutual_information(h[kept].double().numpy(), None, clusters=clusters, sigma=2.0)
            assert found["dsmi_inputs"] == pytest.approx(float(known))
            metrics = collapse_metrics(h, y)
            assert found["nc1"] == pytest.approx(metrics.nc1, rel=1e-6)
            table = np.corrcoef(h.double().T.numpy(), g.double().T.numpy())[: h.shape[1], h.shape[1] :]
            table = table[~np.isnan(table).all(1)][:, ~np.isnan(table).all(0)]
            rows, columns = linear_sum_assignment(-table)
            assert found["matched_correlation"] == pytest.approx(table[rows, columns].mean(), abs=1e-9)
            a, b = (z.double() - z.double().mean(0) for z in (h, g))
            k, m = a @ a.T, b @ b.T
            assert found["cka"] == pytest.approx(float((k * m).sum() / (k.norm() * m.norm())), abs=1e-9)
        report = collapse_report(model, loader(), "5")
        for name, value in report.metrics[0].numbers().items():
            if name != "ncc_agreement":  # here of the kept points
                assert looks["5"][name] == pytest.approx(value, rel=1e-6)
        right = (model(x).argmax(1) == y).double().mean()
        assert looks["1"]["accuracy"] == pytest.approx(float(right))
        logits, means = model(x[kept]), report.metrics[0].class_means
        near = torch.cdist(model[:5](x[kept]).double(), means).argmin(1)
        assert looks["5"]["ncc_agreement"] == pytest.approx(float((logits.argmax(1) == near).double().mean()))


def test_a_network_agrees_with_itself_and_its_permuted_copy():
    model = net().eval()
    twin = copy.deepcopy(model)
    order = torch.randperm(12, generator=random())
    with torch.no_grad():
        twin[0].weight.copy_(model[0].weight[order] * 3)
        twin[0].bias.copy_(model[0].bias[order] * 3)
    (look,) = TrainingMicroscope(model, loader(), ["1"], reference=twin, entropy=False).look()
    assert look.values["matched_correlation"] == pytest.approx(1, abs=1e-9)
    assert look.values["cka"] == pytest.approx(1, abs=1e-9)
    assert "dse" not in look.values


class Shuffled:
    """Shuffled batches that draw from the global generator, as a DataLoader does."""

    def __init__(self):
        self.x, self.y = samples(60, 3)

    def __iter__(self):
        order = torch.randperm(60)
        for rows in order.split(20):
            yield self.x[rows], self.y[rows]


def trained(scope_of=None):
    model = net(2)
    torch.manual_seed(5)
    callback = None if scope_of is None else scope_of(model).callback(every=3)
    loss = lambda m, b: nn.functional.cross_entropy(m(b[0]), b[1])  # noqa: E731
    fit(model, loss, Shuffled(), steps=12, optimizer=torch.optim.Adam(model.parameters(), 1e-2), callback=callback)
    return model


def test_training_does_not_feel_it():
    held = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*samples()), 17)  # draws a seed when it begins
    scopes = []

    def scope_of(model):
        scopes.append(TrainingMicroscope(model, held, ["1"], head="5", sigma=2.0, max_points=30))
        return scopes[0]

    plain, watched = trained(), trained(scope_of)
    for a, b in zip(plain.parameters(), watched.parameters(), strict=True):
        assert torch.equal(a, b)
    assert [look.at for look in scopes[0].history if look.layer == "1"] == [3, 6, 9, 12]
    assert watched.training
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in watched.modules())


def test_a_table_a_figure_and_what_it_cost():
    model = net()
    scope = TrainingMicroscope(model, loader(), ["1", "4"], head="5", reference=net(1), sigma=2.0, max_points=30)
    scope.look(0)
    with torch.no_grad():
        model[0].weight.mul_(2)
    scope.look(10)
    table = scope.to_frame()
    assert table["layer"].tolist() == ["1", "4", "5"] * 2
    assert table["at"].tolist() == [0] * 3 + [10] * 3
    assert table.loc[0, "dse"] != table.loc[3, "dse"]
    cost = scope.cost()
    assert cost["layer"].tolist() == ["1", "4", "5"]
    assert (cost["seconds_per_look"] > 0).all()
    axes = scope.plot()
    assert axes.shape == (3, 3)
    legends = [[text.get_text() for text in row[-1].get_legend().get_texts()] for row in axes]
    assert legends[0] == ["DSE(Z)", "DSMI(Z; Y)"]
    assert legends[2] == ["matched units", "CKA", "NC4", "accuracy"]
    assert axes[1, 0].get_yscale() == "log"
    assert [ax.get_title("left") for ax in axes[0]] == ["1", "4", "5"]
    assert plt.get_fignums() == []


def test_a_bandwidth_that_sees_nothing_is_said_once_for_each_layer():
    scope = TrainingMicroscope(net(), loader(), ["1", "4"], collapse=False, sigma=1e4, max_points=30)
    with pytest.warns(BandwidthWarning) as said:
        _ = scope.look(), scope.look()
    assert [str(one.message).split(":")[0] for one in said] == ["'1'", "'4'"]


def test_an_output_that_is_no_class_has_no_accuracy():
    class Maps(nn.Module):
        def __init__(self):
            super().__init__()
            self.f = nn.Linear(6, 4)

        def forward(self, x):
            return self.f(x)[:, None]

    (look,) = TrainingMicroscope(Maps(), loader(), ["f"], entropy=False).look()
    assert math.isnan(look.values["accuracy"])


def test_memory_does_not_grow_with_the_samples():
    model = mlp([6, 20, 3])
    scope = TrainingMicroscope(model, loader(3000, 100), ["1"], reference=mlp([6, 20, 3], seed=1), max_points=25)
    kept = []
    gather = scope._gather

    def watch(layer, *rest):
        gather(layer, *rest)
        tensors = [*layer.points, layer.classes.means, layer.classes._within, layer.pair._xx, layer.pair._xy]
        kept.append(sum(t.numel() for t in tensors))

    scope._gather = watch
    scope.look()
    assert len(kept) == 30
    assert kept[-1] <= 25 * 20 + 3 * 20 + 4 * 20 * 20


@pytest.mark.parametrize(("how", "expected"), [("mean", 32), ("flatten", 32 * 64)])
def test_maps_are_reduced_for_entropy_and_taken_place_by_place_for_agreement(how, expected):
    model, other = small_cnn((8, 32), 16, seed=0), small_cnn((8, 32), 16, seed=1)
    x = torch.rand(20, 1, 8, 8, generator=random())
    data = [(x[:12], torch.arange(12) % 4), (x[12:], torch.arange(8) % 4)]
    scope = TrainingMicroscope(model, data, ["conv2"], reference=other, pool=how, max_points=20)
    seen = []
    entropies = scope._entropies
    scope._entropies = lambda name, points, labels: seen.append(points.shape) or entropies(name, points, labels)
    (look,) = scope.look()
    assert seen == [(20, expected)]
    with torch.no_grad():
        a, b = (m.conv2(m.conv1(x)).permute(0, 2, 3, 1).flatten(0, 2).double() for m in (model, other))
    a, b = a[:, a.std(0) > 1e-8], b[:, b.std(0) > 1e-8]
    table = torch.corrcoef(torch.cat([a.T, b.T]))[: a.shape[1], a.shape[1] :].numpy()
    rows, columns = linear_sum_assignment(-table)
    assert look.values["matched_correlation"] == pytest.approx(table[rows, columns].mean(), abs=1e-8)
    with pytest.raises(InvalidInput, match=r"'conv2'.*pool="):
        TrainingMicroscope(model, data, ["conv2"]).look()


def test_bad_settings_and_loaders():
    model = net()
    with pytest.raises(InvalidInput, match="no submodule 'layer9'"):
        TrainingMicroscope(model, loader(), ["layer9"])
    with pytest.raises(InvalidInput, match="reference has no submodule '9'"):
        TrainingMicroscope(model, loader(), ["1"], reference=net(), reference_layers=["9"])
    with pytest.raises(InvalidInput, match="one each"):
        TrainingMicroscope(model, loader(), ["1"], reference=net(), reference_layers=["1", "4"])
    with pytest.raises(InvalidInput, match="nothing to look at"):
        TrainingMicroscope(model, loader())
    with pytest.raises(InvalidInput, match="max_points=1"):
        TrainingMicroscope(model, loader(), ["1"], max_points=1)
    with pytest.raises(InvalidInput, match="entropy=False"):
        TrainingMicroscope(model, loader(), ["1"], entropy=False, input_clusters=4)
    half = [*loader(), loader()[0][0]]
    with pytest.raises(InvalidInput, match="90 of 107 samples have a label"):
        TrainingMicroscope(model, half, ["1"], entropy=False).look()
    with pytest.raises(InvalidInput, match="no batches"):
        TrainingMicroscope(model, [], ["1"], entropy=False).look()
    with pytest.raises(InvalidInput, match="no labels"):
        TrainingMicroscope(model, [x for x, _ in loader()], ["1"]).look()
    assert (
        "dsmi_labels" not in TrainingMicroscope(model, [x for x, _ in loader()], ["1"], collapse=False).look()[0].values
    )
    with pytest.raises(InvalidInput, match="every=0"):
        TrainingMicroscope(model, loader(), ["1"]).callback(0)
    with pytest.raises(InvalidInput, match="no look yet"):
        TrainingMicroscope(model, loader(), ["1"]).plot()
    turned = loader()
    scope = TrainingMicroscope(model, turned, ["1"])
    scope.look()
    turned.reverse()
    with pytest.raises(InvalidInput, match="another order"):
        scope.look()


# --- training libraries ------------------------------------------------------------------------------------------------


def test_it_runs_in_a_transformers_training(tmp_path):
    from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments, set_seed

    config = BertConfig(
        vocab_size=20, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, num_labels=3
    )
    ids = torch.randint(1, 20, (24, 6), generator=random())
    rows = [
        {"input_ids": row, "attention_mask": torch.ones(6, dtype=torch.long), "labels": i % 3}
        for i, row in enumerate(ids)
    ]

    def run(scoped):
        set_seed(1)
        model = BertForSequenceClassification(config)
        held = [
            {key: torch.stack([torch.as_tensor(r[key]) for r in rows[i : i + 8]]) for key in rows[0]}
            for i in (0, 8, 16)
        ]
        scope = TrainingMicroscope(
            model,
            held,
            ["bert.encoder.layer.0", "bert.encoder.layer.1"],
            head="classifier",
            pool="first",
            max_points=24,
        )
        arguments = TrainingArguments(
            str(tmp_path / str(scoped)), max_steps=6, per_device_train_batch_size=4, report_to=[], disable_tqdm=True,
            logging_strategy="no", save_strategy="no", use_cpu=True, seed=1,
        )  # fmt: skip
        callbacks = [scope.transformers(every=3)] if scoped else []
        Trainer(model, arguments, train_dataset=rows, callbacks=callbacks).train()
        return model, scope

    (plain, _), (watched, scope) = run(False), run(True)
    for a, b in zip(plain.parameters(), watched.parameters(), strict=True):
        assert torch.equal(a, b)
    table = scope.to_frame()
    assert table["at"].unique().tolist() == [0, 3, 6]
    assert set(table["layer"]) == {"bert.encoder.layer.0", "bert.encoder.layer.1", "classifier"}
    assert table["dse"].notna().all()
    assert table.loc[table["layer"] == "classifier", "nc2_w"].notna().all()


def test_it_runs_in_a_lightning_training(tmp_path):
    lightning = pytest.importorskip("lightning.pytorch")

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = net(3)

        def training_step(self, batch, _):
            return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.1)

    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*samples(40)), 10)

    def run(scoped):
        lightning.seed_everything(0, verbose=False)
        module = Module()
        scope = TrainingMicroscope(module.net, loader(), ["1"], head="5", sigma=2.0, max_points=30)
        trainer = lightning.Trainer(
            max_epochs=2, callbacks=[scope.lightning(every=4)] if scoped else [], logger=False, accelerator="cpu",
            enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path,
        )  # fmt: skip
        trainer.fit(module, data)
        return module, scope

    (plain, _), (watched, scope) = run(False), run(True)
    for a, b in zip(plain.parameters(), watched.parameters(), strict=True):
        assert torch.equal(a, b)
    assert scope.to_frame()["at"].unique().tolist() == [0, 4, 8]


def test_it_runs_in_a_skorch_training():
    skorch = pytest.importorskip("skorch")

    module = net(4)
    scope = TrainingMicroscope(module, loader(), ["1"], head="5", sigma=2.0, max_points=30)
    classifier = skorch.NeuralNetClassifier(
        module, criterion=nn.CrossEntropyLoss, max_epochs=3, lr=0.1, verbose=0, train_split=None,
        callbacks=[scope.skorch(every=1)],
    )  # fmt: skip
    x, y = samples(60)
    classifier.fit(x.numpy(), y.numpy())
    assert scope.to_frame()["at"].unique().tolist() == [0, 1, 2, 3]
    stranger = skorch.NeuralNetClassifier(
        net(5), criterion=nn.CrossEntropyLoss, max_epochs=1, verbose=0, train_split=None, callbacks=[scope.skorch()]
    )
    with pytest.raises(InvalidInput, match="another module"):
        stranger.fit(x.numpy(), y.numpy())
