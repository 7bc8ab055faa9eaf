"""Proof of cause by forks: which one thing, left out, keeps an event from coming."""

from stabilitylab.attribution.attribute import attribute as attribute
from stabilitylab.attribution.forks import Fork as Fork
from stabilitylab.attribution.loop import Loop as Loop
from stabilitylab.attribution.loop import LoopState as LoopState
from stabilitylab.attribution.proof import Attribution as Attribution
from stabilitylab.attribution.without import Without as Without
