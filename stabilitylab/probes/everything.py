"""All probes, connected with each other."""

from __future__ import annotations

from stabilitylab.probes.activation_gradients import ActivationGradientProbe
from stabilitylab.probes.activations import ActivationProbe
from stabilitylab.probes.attention import AttentionProbe
from stabilitylab.probes.base import Probe
from stabilitylab.probes.embedding_rows import EmbeddingRowProbe
from stabilitylab.probes.gradients import GradientProbe
from stabilitylab.probes.precision import PrecisionProbe
from stabilitylab.probes.updates import UpdateProbe


def all_probes() -> list[Probe]:
    """The probes that a monitor uses by default."""
    gradients, activations = GradientProbe(), ActivationProbe()
    activation_gradients = ActivationGradientProbe()
    return [
        gradients,
        EmbeddingRowProbe(),
        activations,
        activation_gradients,
        AttentionProbe(),
        UpdateProbe(),
        PrecisionProbe(activations, activation_gradients, gradients),
    ]
