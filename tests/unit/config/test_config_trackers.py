"""The objects raptr_ds.log.wandb and raptr_ds.log.mlflow: what is refused, and that they are kept."""

import json

import pytest

from raptr_ds.config.load import load_run_config
from raptr_ds.errors import ConfigError


@pytest.mark.parametrize(
    ("log", "says"),
    [
        ("wandb=true", "raptr_ds.log.wandb=True (from --set) must be an object"),
        ("wandb={}", "raptr_ds.log.wandb.project is missing. The project that the run belongs to."),
        ("wandb.projct=a", "did you mean 'project'? Correct or remove it. Keys of raptr_ds.log.wandb: project, name"),
        ('wandb={"project": "a", "mode": "ofline"}', "must be one of online, offline; did you mean 'offline'?"),
        ("mlflow.experiment=3", "raptr_ds.log.mlflow.experiment=3 (from --set) must be a string"),
        ("mlflow.tracking_uri=http://a", "raptr_ds.log.mlflow.experiment is missing."),
        ("wnadb.project=a", "did you mean 'wandb'?"),
    ],
)
def test_wrong_trackers(load, log, says):
    with pytest.raises(ConfigError) as error:
        load(f"raptr_ds.log.{log}")
    assert says.replace(" (from --set)", "") in str(error.value).replace(" (from --set)", "")


@pytest.mark.parametrize("log", ["wandb.project=a", 'mlflow={"experiment": "e", "tracking_uri": "http://a:1"}'])
def test_trackers_are_kept_in_the_resolved_run_file(load, log, tmp_path):
    config = load(f"raptr_ds.log.{log}")
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config.resolved()))
    assert config.log.wandb or config.log.mlflow
    assert load_run_config(path, (), 1).log == config.log
