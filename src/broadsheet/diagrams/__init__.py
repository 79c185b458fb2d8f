"""Draw networks so that the drawing is the program."""

from broadsheet._lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {"neural_circuit_diagrams": ["Axis", "Diagram", "axes", "diagram", "read_svg"]},
    submodules=["neural_circuit_diagrams"],
)
