"""What is minimised: one file for each objective, and what they share."""

from meanflow.config import ImprovedMeanFlowConfig, MeanFlowConfig
from meanflow.objectives.improved import ImprovedMeanFlow
from meanflow.objectives.meanflow import MeanFlow

# The objective that a recipe means, by the class of its options.
OBJECTIVES = {MeanFlowConfig: MeanFlow, ImprovedMeanFlowConfig: ImprovedMeanFlow}
