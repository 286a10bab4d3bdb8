"""The whole configuration as plain values."""

import dataclasses

from moe_jax.config import Config, default_config, from_config_dict, to_flat_dict


def test_dotted_keys_hold_every_value_of_a_config():
    """ml_collections sets them one by one: what comes out is the config they were taken from."""
    data = dataclasses.replace(Config().data, mixture={"a": {"weight": 2.0}})
    config = dataclasses.replace(Config(seed=7), data=data)
    flat = to_flat_dict(config)
    assert flat["seed"] == 7 and flat["data.mixture.a.weight"] == 2.0
    assert "data.mixture" not in to_flat_dict(Config())
    found = default_config()
    found.data.mixture = {"a": {"weight": 0.0}}
    found.update_from_flattened_dict(flat)
    typed = from_config_dict(found)
    moe = dataclasses.replace(typed.model.moe, options={})  # default_config lists their defaults
    assert config == dataclasses.replace(typed, model=dataclasses.replace(typed.model, moe=moe))
