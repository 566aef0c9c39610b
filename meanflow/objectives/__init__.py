"""What is minimised: one file for each objective, and what they share."""

from meanflow.config import MeanFlowConfig
from meanflow.objectives.meanflow import MeanFlow

# The objective that a recipe means, by the class of its options.
OBJECTIVES = {MeanFlowConfig: MeanFlow}
