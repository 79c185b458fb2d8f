"""The microscope as the callback of transformers, Lightning and skorch, each imported only when asked for."""

from typing import TYPE_CHECKING, Any

from broadsheet.errors import need

if TYPE_CHECKING:
    from broadsheet.geometry.microscope.looks import TrainingMicroscope


def transformers_callback(scope: "TrainingMicroscope", every: int) -> Any:
    """For ``transformers.Trainer``: looks at step 0 and every ``every`` optimizer steps, on the main process.

    Args:
        scope: of the model that is trained.
        every: steps.
    """
    from transformers import TrainerCallback

    class Callback(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.is_world_process_zero and state.global_step == 0:
                scope.look(0)

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.is_world_process_zero and state.global_step % every == 0:
                scope.look(state.global_step)

    return Callback()


def lightning_callback(scope: "TrainingMicroscope", every: int) -> Any:
    """For ``lightning.Trainer`` (or ``pytorch_lightning``): looks at step 0 and every ``every`` steps.

    Args:
        scope: of the module that is trained, or of a part of it.
        every: steps.

    Raises:
        MissingExtra: Lightning is not installed.
    """
    lightning = need("lightning.pytorch", "lightning")

    class Callback(lightning.Callback):  # type: ignore[misc, name-defined]
        _last = -1

        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            if trainer.is_global_zero and trainer.global_step == 0:
                self._look(0)

        def on_train_batch_end(self, trainer: Any, pl_module: Any, *rest: Any) -> None:
            if trainer.is_global_zero and trainer.global_step % every == 0:
                self._look(trainer.global_step)

        def _look(self, step: int) -> None:
            if step != self._last:  # with accumulated gradients several batches end at one step
                self._last = step
                scope.look(step)

    return Callback()


def skorch_callback(scope: "TrainingMicroscope", every: int) -> Any:
    """For skorch: looks at epoch 0 and every ``every`` epochs.

    The net makes its module when it is fitted: the microscope's model has to be that module, so hand an initialised
    module to the net (``NeuralNetClassifier(module, ...)`` keeps it unless parameters are set), or look at
    ``net.module_``.

    Args:
        scope: of the module that is trained.
        every: epochs.

    Raises:
        MissingExtra: skorch is not installed.
    """
    callbacks = need("skorch.callbacks", "recordings")

    class Microscope(callbacks.Callback):  # type: ignore[misc, name-defined]
        def on_train_begin(self, net: Any, X: Any = None, y: Any = None, **kwargs: Any) -> None:
            _same(scope, net)
            if not net.history:
                scope.look(0)

        def on_epoch_end(self, net: Any, **kwargs: Any) -> None:
            epoch = len(net.history)
            if epoch % every == 0:
                scope.look(epoch)

    return Microscope()


def _same(scope: "TrainingMicroscope", net: Any) -> None:
    from broadsheet.errors import InvalidInput

    if scope.model is not net.module_:
        raise InvalidInput(
            "the microscope looks at another module than the one the net trains: make it with "
            "net.initialize().module_, or hand the net an initialised module"
        )
