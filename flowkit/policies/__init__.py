"""Policies of robots: chunks of actions decoded by a flow, executed and replanned.

`chunks` cuts demonstrations into windows of actions, `ActionNormalizer` holds their statistics, and
`PolicyVelocity` joins them with a network, so that a checkpoint is a whole policy. `ChunkPolicy`
decodes a chunk for an observation, and `RecedingHorizon` executes a part of each. `environment`
makes the simulators with their scripted experts. `LatentActionModel` finds the codes of motions in
episodes without actions.
"""

from flowkit.policies.chunks import Episode, chunks, windows
from flowkit.policies.environments import Environment, environment
from flowkit.policies.latents import LatentActionModel
from flowkit.policies.metrics import action_change, jerk, success, timing
from flowkit.policies.normalizer import ActionNormalizer
from flowkit.policies.receding import RecedingHorizon
from flowkit.policies.rollouts import Rollout, demonstrate, roll_out
from flowkit.policies.velocity import ChunkPolicy, ImageEncoder, PolicyVelocity

__all__ = [
    "ActionNormalizer",
    "ChunkPolicy",
    "Environment",
    "Episode",
    "ImageEncoder",
    "LatentActionModel",
    "PolicyVelocity",
    "RecedingHorizon",
    "Rollout",
    "action_change",
    "chunks",
    "demonstrate",
    "environment",
    "jerk",
    "roll_out",
    "success",
    "timing",
    "windows",
]
