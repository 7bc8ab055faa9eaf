"""Find spikes as they begin, distinguish their kinds, explain them and respond to them."""

from stabilitylab.spikes.detector import SpikeDetector
from stabilitylab.spikes.episodes import KINDS, Episode, episodes_of
from stabilitylab.spikes.offline import find_episodes
from stabilitylab.spikes.responses import Decision, Policy, Responder, ResponderConfig
from stabilitylab.spikes.score import spike_score

__all__ = [
    "KINDS",
    "Decision",
    "Episode",
    "Policy",
    "Responder",
    "ResponderConfig",
    "SpikeDetector",
    "episodes_of",
    "find_episodes",
    "spike_score",
]
