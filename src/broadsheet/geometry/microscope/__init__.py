"""A microscope on training: entropy and information, neural collapse and convergence of layers, in one pass a look.

    scope = TrainingMicroscope(model, held_out, ["layer1", "layer2"], head="fc", reference=other_network)
    for step in ...: train(); scope.callback(every=100)(step, model)      # a loop of one's own, or nn.training.fit
    trainer = Trainer(..., callbacks=[scope.transformers(every=100)])     # Hugging Face
    trainer = L.Trainer(callbacks=[scope.lightning(every=100)])           # Lightning
    net = NeuralNetClassifier(..., callbacks=[scope.skorch(every=1)])     # skorch, by epochs
    scope.plot(); scope.to_frame(); scope.cost()

Measures are those of ``diffusion_spectral_entropy`` (arXiv:2312.04823), ``neural_collapse`` (arXiv:2301.00437) and of
convergent learning (arXiv:1511.07543).
"""

from broadsheet.geometry.microscope.looks import Look, TrainingMicroscope

__all__ = ["Look", "TrainingMicroscope"]
