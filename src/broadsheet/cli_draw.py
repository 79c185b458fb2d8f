"""The command that draws a module of the user's. What is heavy is imported when it runs."""

from pathlib import Path
from typing import Annotated, Any

import typer


def draw(
    what: Annotated[str, typer.Argument(help="file.py:Model, a class or a function that makes the module.")],
    out: Annotated[Path, typer.Option(help="The file to write: .svg, .pdf or .png.")] = Path("diagram.svg"),
    inputs: Annotated[
        str | None,
        typer.Option(
            help="Shapes, such as 2,3,32,32 or, for several, 2,5:int;2,5,16. Otherwise example_inputs of the file or of"
            " the model, or else shapes that its first layer reads."
        ),
    ] = None,
    axis_names: Annotated[str | None, typer.Option(help="Names of the axes of each input: 'b c y x; b m'.")] = None,
    depth: Annotated[int | None, typer.Option(help="How deep to go into submodules; all the way by default.")] = None,
    width: Annotated[int, typer.Option(help="Pixels at which rows wrap.")] = 1000,
    cost: Annotated[bool, typer.Option(help="Write multiply-adds and elements held under the columns.")] = False,
) -> None:
    """Draw a torch module as a neural circuit diagram."""
    from broadsheet.diagrams.neural_circuit_diagrams import diagram, opaque_share

    model, given = _loaded(what)
    tensors = _shaped(inputs) if inputs is not None else _examples(what, model, given)
    names = [part.strip() for part in axis_names.split(";")] if axis_names is not None else None
    made = diagram(model, tensors, axis_names=names, depth=depth)
    made.save(out, width=float(width), cost=cost, title=what)
    share = opaque_share(made)
    typer.echo(f"{out}: {len(made.steps)} steps, {made.signature}" + (f", {share:.0%} opaque boxes" if share else ""))


def _loaded(what: str) -> tuple[Any, Any]:
    import importlib.util
    import sys

    from torch import nn

    from broadsheet.errors import InvalidInput

    file, colon, name = what.rpartition(":")
    if not colon or not Path(file).is_file():
        raise InvalidInput(f"{what!r}: expected a file of Python and a name in it, such as module.py:Model")
    spec = importlib.util.spec_from_file_location(Path(file).stem, file)
    assert spec is not None
    assert spec.loader is not None
    source = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(Path(file).resolve().parent))  # so that it finds its neighbours
    try:
        spec.loader.exec_module(source)
    finally:
        sys.path.pop(0)
    found = getattr(source, name, None)
    if found is None:
        known = sorted(key for key, value in vars(source).items() if callable(value) and not key.startswith("_"))
        raise InvalidInput(f"{name!r} is not in {file}: it has {', '.join(known) or 'nothing to draw'}")
    try:
        model = found if isinstance(found, nn.Module) else found()
    except TypeError as error:
        raise InvalidInput(f"{what} needs arguments ({error}): draw a function that makes the module") from error
    if not isinstance(model, nn.Module):
        raise InvalidInput(f"{what} gives a {type(model).__name__}: expected a torch module")
    return model, getattr(source, "example_inputs", None)


def _examples(what: str, model: Any, given: Any) -> Any:
    from broadsheet.errors import InvalidInput

    given = getattr(model, "example_inputs", given)
    if given is not None:
        return given() if callable(given) else given
    from broadsheet.diagrams.neural_circuit_diagrams.guess import guess_inputs

    guessed = guess_inputs(model)
    if guessed is None:
        raise InvalidInput(f"{what}: give --inputs with shapes, or put example_inputs beside the model")
    shapes = ";".join(",".join(map(str, x.shape)) + ("" if x.is_floating_point() else ":int") for x in guessed)
    typer.echo(f"No inputs were given: drawn for --inputs {shapes!r}, with which the model runs.", err=True)
    return guessed


def _shaped(text: str) -> tuple[Any, ...]:
    import torch

    from broadsheet.errors import InvalidInput

    found = []
    for part in text.split(";"):
        sizes, _, kind = part.strip().partition(":")
        try:
            shape = [int(n) for n in sizes.split(",")] if sizes else []
        except ValueError:
            raise InvalidInput(f"--inputs {text!r}: expected sizes with commas between, such as 2,3,32,32") from None
        if kind not in ("", "float", "int"):
            raise InvalidInput(f"--inputs {text!r}: {kind!r} is neither float nor int")
        found.append(torch.zeros(shape, dtype=torch.long) if kind == "int" else torch.zeros(shape))
    return tuple(found)
