"""Bad input to stochgrad.llm: one sentence of our own."""

import os
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stochgrad import em, llm
from tests.bad_inputs.test_em import COUNT, FLAG, INSTANCE, NUMBER, OPTIONAL_COUNT, refuses

CONFIG = llm.Config(
    layers=2, width=8, hidden=12, heads=4, kv_heads=2, head_width=2, vocabulary=10, context=16,
    rope_base=100.0, eps=1e-5,
)  # fmt: skip
LAYERS = {
    "attention_norm": (8,),
    "query": (8, 8),
    "key": (8, 4),
    "value": (8, 4),
    "output": (8, 8),
    "mlp_norm": (8,),
    "gate": (8, 12),
    "up": (8, 12),
    "down": (12, 8),
}
PARAMS = {
    "embedding": jnp.ones((10, 8)),
    "norm": jnp.ones(8),
    "layers": {name: jnp.ones((2, *shape)) for name, shape in LAYERS.items()},
}
MODEL = llm.Llama(PARAMS, CONFIG, None, 1)
PROMPTS = em.left_padded([[1, 2], [3]])
DTYPES = (None, jnp.int32, "int32", 3, "f99", bool, complex, {})
CONFIGS = (
    *INSTANCE, llm.Config, CONFIG._asdict(), tuple(CONFIG),
    *(CONFIG._replace(layers=bad) for bad in COUNT),
    *(CONFIG._replace(eps=bad) for bad in (0.0, *NUMBER)),
    *(CONFIG._replace(rope_base=bad) for bad in (0.0, *NUMBER)),
    CONFIG._replace(kv_heads=3), CONFIG._replace(head_width=3),
)  # fmt: skip
PATHS = (None, 3, "", b"file", "/no/such/file", os.path.dirname(__file__), __file__, ["a"])


def with_params(**changes):
    return MODEL._replace(params={**PARAMS, **changes})


def used(model=MODEL, params=None, length=3, **settings):
    policy = model.policy(length=length, **settings)
    return policy.greedy(model.params if params is None else params, PROMPTS)


MODELS = {
    "no params": (MODEL._replace(params=None), "params"),
    "empty params": (MODEL._replace(params={}), "params"),
    "no config": (MODEL._replace(config=None), "config"),
    "no layers": (with_params(layers=None), "layers"),
    "missing": (with_params(layers={"query": PARAMS["layers"]["query"]}), "layers"),
    "integers": (with_params(embedding=jnp.ones((10, 8), jnp.int32)), "embedding"),
    "list": (with_params(norm=[1.0] * 8), "norm"),
    "other shape": (with_params(embedding=jnp.ones((8, 10))), "embedding"),
    "other logits": (with_params(logits=jnp.ones((8, 10))), "logits"),
    "other config": (MODEL._replace(config=CONFIG._replace(heads=2)), "query"),
    "more layers": (MODEL._replace(config=CONFIG._replace(layers=3)), "layers"),
}
GOOD_AND_WRONG = {
    "read_gguf": (llm.read_gguf, {"path": __file__}, {"path": PATHS, "dtype": DTYPES}),
    "llama": (llm.llama, {"config": CONFIG}, {"config": CONFIGS, "remat": FLAG}),
    "llama_cache": (llm.llama_cache, {"config": CONFIG}, {"config": CONFIGS, "dtype": DTYPES}),
    "cache": (llm.llama_cache(CONFIG), {"batch": 1, "slots": 2}, {"batch": COUNT, "slots": COUNT}),
    "policy": (
        MODEL.policy,
        {"length": 3},
        {
            "length": COUNT,
            "temperature": (0.0, *NUMBER),
            "top_p": (0.0, 1.5, *NUMBER),
            "context": (*OPTIONAL_COUNT, 17),
            "end": (-1, 1.5, "end", True),
            "remat": FLAG,
        },
    ),
}
CASES = [
    pytest.param(
        partial(function, **{**good, argument: bad}), argument, id=f"{name}-{argument}-{n}"
    )
    for name, (function, good, wrong) in GOOD_AND_WRONG.items()
    for argument, values in wrong.items()
    for n, bad in enumerate(values)
]


@pytest.mark.parametrize(("thunk", "name"), CASES)
def test_bad_arguments_get_one_sentence(thunk, name):
    refuses(thunk, name)


@pytest.mark.parametrize(("model", "name"), MODELS.values(), ids=MODELS)
def test_models_that_do_not_fit_get_one_sentence(model, name):
    refuses(lambda: model.policy(length=3), name)


def direct(inputs=None, cache=None, keep=1, params=PARAMS):
    ones = jnp.ones((2, 2), jnp.int32)
    right = em.Inputs(ones, ones, jnp.ones((2, 2, 4), bool), jnp.int32(0))
    cache = llm.llama_cache(CONFIG)(2, 4) if cache is None else cache
    return llm.llama(CONFIG)(params, right if inputs is None else inputs, cache, keep)


USES = {
    "params": (lambda: used(params={}), "params"),
    "params of another": (lambda: used(params=with_params(norm=jnp.ones(4)).params), "norm"),
    "context": (lambda: used(length=15), "context"),
    "end beyond": (lambda: used(end=10), "end"),
    "inputs": (lambda: direct(inputs=jnp.ones((2, 2), jnp.int32)), "inputs"),
    "keep": (lambda: direct(keep=3), "keep"),
    "keep of none": (lambda: direct(keep=0), "keep"),
    "cache": (lambda: direct(cache=jnp.zeros(3)), "cache"),
    "cache of another batch": (lambda: direct(cache=llm.llama_cache(CONFIG)(3, 4)), "cache"),
    "network's params": (lambda: direct(params=None), "params"),
}


@pytest.mark.parametrize(("thunk", "name"), USES.values(), ids=USES)
def test_bad_uses_get_one_sentence(thunk, name):
    refuses(thunk, name)


def test_good_ones_are_taken():
    used(end=np.int64(1), context=np.int64(16), temperature=1)
    direct()
    llm.llama_cache(CONFIG, "bfloat16")(np.int64(1), 2)
    adapters = {**PARAMS["layers"], "query_a": jnp.ones((2, 8, 1))}
    jax.eval_shape(lambda: used(with_params(layers=adapters)))
