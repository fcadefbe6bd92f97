"""A plain function of a dict of arrays as the model. `python examples/plain_function.py`"""

import jax
import jax.numpy as jnp
import optax

import jaxunlearn as ju

SCHEDULE, DRAW, TX = ju.schedule.linear(1000), ju.timesteps.uniform(1000), optax.adam(1e-3)
IMAGES = jax.random.uniform(jax.random.key(0), (16, 8, 8, 1), minval=-1.0)  # 8x8 pixels in [-1, 1]
BATCH = ju.Batch(keep=ju.Example(IMAGES[:8]), forget=ju.Example(IMAGES[8:]))


def predict(params, x_t, t, cond=None):
    features = jnp.concatenate([x_t.reshape(-1, 64), t[:, None] / 1000], axis=1)
    return (jax.nn.silu(features @ params["inner"]) @ params["outer"]).reshape(x_t.shape)


def unlearn(objective, combine, params, predict):
    step = jax.jit(ju.make_train_step(objective, combine, predict, TX))
    state = ju.init_state(params, TX, combine, ref=objective.needs_ref)
    for i in range(20):
        state, metrics = step(state, BATCH, DRAW(jax.random.fold_in(jax.random.key(1), i), BATCH))
    print({name: float(value) for name, value in metrics.items() if name.startswith("loss/")})


if __name__ == "__main__":
    params = {"inner": 0.1 * jax.random.normal(jax.random.key(2), (65, 64)), "outer": jnp.zeros((64, 64))}
    unlearn(ju.siss(SCHEDULE, lam=0.5), ju.relative_norm(0.1), params, predict)
    coarse = ju.filtered(ju.mean_squares, ju.low_pass(0.5))  # NPO on coarse shapes alone
    unlearn(ju.npo(SCHEDULE, level=1.0, forget_error=coarse), ju.weighted_sum(keep=1.0, forget=0.1), params, predict)
