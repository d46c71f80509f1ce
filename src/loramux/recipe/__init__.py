"""The recipe: one YAML that says what is trained, on what, and how.

A recipe describes one job, or several under `jobs:`; top-level `method`, `data` and `training` are then the
defaults of every job.

    for job in load_recipe("recipe.yaml", ["training.steps=10"]).jobs_resolved(): ...
"""

from loramux.recipe.load import (
    dump_recipe,
    load_job,
    load_recipe,
    override,
    parse_recipe,
    recipe_schema,
)
from loramux.recipe.resolve import check_method
from loramux.recipe.schema import (
    DEMO_PREFIX,
    DataConfig,
    DataSource,
    DpoConfig,
    JobRecipe,
    JointConfig,
    MethodSpec,
    Recipe,
    StopConfig,
    Template,
    TextTemplate,
    TrainingConfig,
)

__all__ = [
    "DEMO_PREFIX",
    "DataConfig",
    "DataSource",
    "DpoConfig",
    "JobRecipe",
    "JointConfig",
    "MethodSpec",
    "Recipe",
    "StopConfig",
    "Template",
    "TextTemplate",
    "TrainingConfig",
    "check_method",
    "dump_recipe",
    "load_job",
    "load_recipe",
    "override",
    "parse_recipe",
    "recipe_schema",
]
