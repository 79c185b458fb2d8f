"""Refine fitted probes by gradients: on the states that steering itself brings about, or through the frozen model.

A probe is fitted to states of unsteered prompts. Once steering begins, every later layer and every later token is in a
state that it has not seen. :func:`refine` runs the training prompts with steering on, keeps what each probe met, and
goes on training on the union (as DAgger does for policies). :func:`refine_directly` asks for the end instead: the
probability of answers in the wanted language, gone back through the model into probes, and centroids if asked. The
model's own weights never change.
"""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from broadsheet.errors import InvalidInput
from broadsheet.interpretability.g_act.gact import GACT, set_scores, split_prompts, stacked
from broadsheet.interpretability.g_act.injection import injecting
from broadsheet.interpretability.g_act.model import SteeringModel
from broadsheet.interpretability.g_act.pairs import PairActivations, token_ids_of
from broadsheet.interpretability.g_act.probes import train_probes
from broadsheet.nn.generation import encode, generate_tokens, until
from broadsheet.nn.hooks import evaluating
from broadsheet.nn.padding import right_padded
from broadsheet.nn.progress import SILENT, Progress


def refine(
    steering: SteeringModel,
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[str],
    pairs: PairActivations,
    *,
    alpha: float | None = None,
    rounds: int = 2,
    epochs: int = 50,
    lr: float = 1e-3,
    weight_decay: float = 1e-2,
    max_new_tokens: int = 8,
    batch_size: int = 16,
    fitted: GACT | None = None,
    progress: Progress = SILENT,
) -> SteeringModel:
    """Train the probes further on the states of the steered model (online refinement).

    Args:
        steering: fitted; left as it is.
        model, tokenizer: whose states they are.
        prompts: neutral prompts in the order of the pairs.
        pairs: that ``steering`` was fitted to.
        alpha: strength of the runs; None for the fitted one.
        rounds: of running and training.
        epochs, lr, weight_decay: of each round.
        max_new_tokens: tokens generated for each prompt; every one gives a state in each layer.
        batch_size: prompts in a pass.
        fitted: the settings that ``steering`` was fitted with, for the same split; None for the defaults.
        progress: where rounds are shown.

    Returns:
        a refined copy; ``val_accuracy`` and ``macro_f1`` are again those of unsteered states of held-out prompts.

    Raises:
        InvalidInput: other prompts than pairs, or nothing to choose from.
    """
    labels = steering.labels.expand(-1, len(steering.layers))
    if not len(prompts) == len(pairs) == len(labels):
        raise InvalidInput(
            f"{len(prompts)} prompts, {len(pairs)} pairs, fitted to {len(labels)}: the same prompts in the same order "
            "are needed (leave out pairs that fitting dropped)"
        )
    if steering.n_clusters == 1:
        raise InvalidInput("one direction: there is nothing for a probe to choose")
    settings = fitted or GACT()
    train, held = split_prompts(len(pairs), settings.validation, settings.seed)
    refined = copy.deepcopy(steering)
    x, y = stacked(pairs, labels, train)
    seen_x, seen_y = [x], [y]
    texts: list[str] = [str(prompts[i]) for i in train.tolist()]
    ids, mask = encode(texts, tokenizer, next(model.parameters()).device)
    with progress.task("online refinement", total=rounds) as task:
        for _ in range(rounds):
            for begin in range(0, len(ids), batch_size):
                rows = slice(begin, begin + batch_size)
                states, owners = _met(refined, model, ids[rows], mask[rows], alpha, max_new_tokens)
                seen_x.append(states)
                seen_y.append(labels[train[rows]][owners].T)
            probes = train_probes(
                torch.cat(seen_x, 1), torch.cat(seen_y, 1), steering.n_clusters, start=refined.probes,
                epochs=epochs, lr=lr, weight_decay=weight_decay,
            )  # fmt: skip
            refined.set_probes(probes)
            task.advance()
    set_scores(refined, *stacked(pairs, labels, held))
    return refined


def _met(
    steering: SteeringModel, model: nn.Module, ids: Tensor, mask: Tensor, alpha: float | None, n: int
) -> tuple[Tensor, Tensor]:
    """States ``[layers, m, d]`` that the probes meet while prompts are continued, and the text of each."""
    kept: list[list[Tensor]] = [[] for _ in steering.layers]

    def record(i: int, states: Tensor, chosen: Tensor | None) -> None:
        kept[i].append(states[:, -1].float().cpu())  # the newest token of every text

    # Layers that are not steered are watched too: hooks of the outer block come first, and see what steering finds.
    watch = injecting(model, steering.places(model), lambda i, states: torch.zeros_like(states), record=record)
    with watch, steering.steered(model, alpha, allow_nested=True):
        tokens = generate_tokens(model, ids, mask, max_new_tokens=n, eos=_eos(model))
    lengths = torch.tensor([len(row) for row in until(tokens, _eos(model))])
    steps = min(len(kept[0]), tokens.shape[1])
    texts = torch.cat([(lengths > step).nonzero().flatten() for step in range(steps)])
    states = torch.stack([torch.cat([layer[step][lengths > step] for step in range(steps)]) for layer in kept])
    return states, texts


def _eos(model: nn.Module) -> int | None:
    eos = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    eos = getattr(getattr(model, "config", None), "eos_token_id", None) if eos is None else eos
    return eos[0] if isinstance(eos, list) else eos


def refine_directly(
    steering: SteeringModel,
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[str],
    answers: Sequence[str],
    *,
    alpha: float | None = None,
    epochs: int = 5,
    lr: float = 1e-4,
    centroids: bool = False,
    batch_size: int = 16,
    progress: Progress = SILENT,
) -> SteeringModel:
    """Raise the probability of wanted answers by gradients through the frozen model into the probes.

    The choice of a direction is hard in the forward pass and soft in the backward one (straight-through).

    Args:
        steering: fitted; left as it is.
        model, tokenizer: the model, whose weights stay as they are.
        prompts, answers: texts; an answer follows its prompt.
        alpha: strength; None for the fitted one.
        epochs, lr: of AdamW over all prompts.
        centroids: train the directions too (their length at a given ``alpha`` stays the layer's mean norm).
        batch_size: prompts in a step.
        progress: where epochs are shown.

    Returns:
        a refined copy. ``val_accuracy`` and ``macro_f1`` are those of before: labels play no part here.
    """
    if len(prompts) != len(answers) or not len(prompts):
        raise InvalidInput(f"{len(prompts)} prompts and {len(answers)} answers: one answer for each prompt is expected")
    refined = copy.deepcopy(steering)
    strength = steering.alpha if alpha is None else float(alpha)
    rows = [refined._row(layer) for layer in refined.steered_layers]
    where = refined.places(model, refined.steered_layers)
    device = next(model.parameters()).device
    weight, bias = (x.to(device).clone().requires_grad_() for x in refined.probes.folded())
    centres = refined.centroids.to(device).clone().requires_grad_(centroids)
    norms = refined.norms.to(device)
    optimizer = torch.optim.AdamW([weight, bias, *([centres] if centroids else [])], lr)

    def rule(i: int, states: Tensor) -> Tensor:
        row = rows[i]
        units = centres[row] / centres[row].norm(dim=-1, keepdim=True).clamp_min(1e-30) * norms[row] * strength
        scores = states.float() @ weight[row].T + bias[row]
        soft = scores.softmax(-1)
        hard = nn.functional.one_hot(scores.argmax(-1), len(units)).to(soft)
        return (hard + soft - soft.detach()) @ units

    batches = _answered(tokenizer, prompts, answers, batch_size, device)
    trainable = [(p, p.requires_grad) for p in model.parameters()]
    try:
        for p, _ in trainable:
            p.requires_grad_(False)
        with evaluating(model), torch.enable_grad(), progress.task("direct refinement", total=epochs) as task:
            for _ in range(epochs):
                for ids, mask, starts in batches:
                    columns = torch.arange(ids.shape[1], device=device)
                    steered = (columns >= starts[:, None] - 1) & mask.bool()
                    with injecting(model, where, rule, steered):
                        output: Any = model(ids, attention_mask=mask)
                    logits = getattr(output, "logits", output)[:, :-1].float()
                    wanted = ids[:, 1:].masked_fill(~((columns[1:] >= starts[:, None]) & mask[:, 1:].bool()), -100)
                    loss = nn.functional.cross_entropy(logits.flatten(0, 1), wanted.flatten(), ignore_index=-100)
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()
                task.advance(loss=float(loss.detach()))
    finally:
        for p, wanted_grad in trainable:
            p.requires_grad_(wanted_grad)
    with torch.no_grad():  # back to standardised states
        w, b = weight.detach().cpu(), bias.detach().cpu()
        refined.weight.copy_(w * refined.std[:, None])
        refined.bias.copy_(b + torch.einsum("lkd,ld->lk", w, refined.mean))
        refined.centroids.copy_(centres.detach().cpu())
    return refined


def _answered(
    tokenizer: Any, prompts: Sequence[str], answers: Sequence[str], size: int, device: torch.device
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Ids, mask and where the answers begin, padded on the right."""
    ids_of, batches = token_ids_of(tokenizer), []
    texts = list(zip(prompts, answers, strict=True))
    for begin in range(0, len(texts), size):
        rows, starts = [], []
        for prompt, answer in texts[begin : begin + size]:
            whole, head = ids_of(f"{prompt} {answer}"), ids_of(prompt)
            starts.append(min(len(head), len(whole) - 1))
            rows.append(whole)
        length = max(map(len, rows))
        ids = torch.zeros(len(rows), length, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for i, row in enumerate(rows):
            ids[i, : len(row)], mask[i, : len(row)] = torch.tensor(row), 1
        padded = right_padded(ids, mask)
        mask = torch.ones_like(ids) if padded.attention_mask is None else padded.attention_mask
        batches.append((padded.input_ids.to(device), mask.to(device), torch.tensor(starts, device=device)))
    return batches
