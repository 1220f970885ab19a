"""The engine by layers: a loop of a few lines finds the same numbers."""

from __future__ import annotations

import copy

import numpy as np
import pytest
from models import TINY, a_split, a_tiny_model

from arrays import to_host
from npbn import functional as F
from npbn.engine.layers import LayersEngine
from npbn.optim import SGD


def an_engine(model, device, *, batch_size=8) -> LayersEngine:
    train, test = a_split(TINY, 20, 1).to(device), a_split(TINY, 300, 2).to(device)
    optimizer = SGD(model.parameters(), 0.5, momentum=0.9)
    return LayersEngine(model, optimizer, train, test, batch_size=batch_size, backend=device)


@pytest.fixture
def model(device, dtype):
    found = a_tiny_model()
    found.to(device, dtype)
    return found


def test_a_step_for_each_batch(model, device, dtype):
    expected = copy.deepcopy(model)
    engine = an_engine(model, device)
    optimizer = SGD(expected.parameters(), 0.5, momentum=0.9)
    order = np.random.default_rng(0).permutation(20)[:18]
    results = engine.steps(order)
    for part in (order[:8], order[8:16], order[16:]):
        result = next(results)
        ((x, labels),) = engine.train.batches(20, dtype, order=device.asarray(part))
        logits = expected.forward(x)
        loss, cache = F.softmax_cross_entropy(logits, labels)
        expected.backward(F.softmax_cross_entropy_backward(cache))
        optimizer.step()
        assert (result.examples, float(result.loss)) == (len(part), float(loss))
        assert int(result.correct) == np.sum(to_host(logits).argmax(1) == to_host(labels))
        assert engine.optimizer.steps == optimizer.steps
    assert next(results, None) is None
    for name, value in expected.state_dict().items():
        np.testing.assert_array_equal(model.state_dict()[name], value, err_msg=name)


def test_who_stops_asking_stops_the_training(model, device):
    engine = an_engine(model, device)
    results = engine.steps(np.arange(20))
    assert engine.optimizer.steps == 0
    next(results)
    results.close()
    assert engine.optimizer.steps == 1


@pytest.mark.parametrize("training", [True, False])
def test_evaluation_is_in_prediction_mode_and_leaves_no_trace(training, model, device, dtype):
    engine = an_engine(model, device)
    list(engine.steps(np.arange(20)))
    if not training:
        model.eval()
    before = model.state_dict()
    results = []
    for result in engine.evaluate():
        assert model.training == model.layers[1].training == training
        results.append(result)
    for name, value in before.items():
        np.testing.assert_array_equal(model.state_dict()[name], value, err_msg=name)
    assert [result.examples for result in results] == [256, 44]
    model.eval()
    ((x, labels),) = engine.test.batches(300, dtype)
    logits = model.forward(x)
    loss, _ = F.softmax_cross_entropy(logits, labels)
    mean = sum(result.examples * float(result.loss) for result in results) / 300
    assert mean == pytest.approx(float(loss), rel=1e-6)
    correct = sum(int(result.correct) for result in results)
    assert correct == np.sum(to_host(logits).argmax(1) == to_host(labels))
