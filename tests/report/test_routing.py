"""Routing tables: shares of what was selected, per task and layer."""

import json

import numpy as np
import pytest

from loramux.report.routing import RoutingCounter, normalised_entropy

COLUMNS = ("q", "k", "v")


def test_the_table_is_the_share_of_prompts_that_select_a_module():
    counter = RoutingCounter()
    counter.add("a", 0, COLUMNS, [[0.5, 0.5, 0.0], [0.9, 0.0, 0.1]])
    counter.add("a", 0, COLUMNS, [[0.0, 1.0, 0.0], [0.4, 0.6, 0.0]])
    counter.count("a", 4)
    routing = counter.result()
    assert routing.tables["a"].tolist() == [[0.75, 0.75, 0.25]]
    assert routing.measure == "selected"
    assert routing.counts == {"a": 4}


def test_padding_is_not_counted():
    counter = RoutingCounter("tokens")
    gates = [[1.0, 0.0], [0.0, 1.0], [0.0, 1.0]]
    counter.add("a", 0, ("0", "1"), gates, valid=[True, True, False])
    assert counter.result().tables["a"].tolist() == [[0.5, 0.5]]


def test_a_router_that_selects_everything_is_shown_by_its_weights():
    counter = RoutingCounter()
    counter.add("a", 0, COLUMNS, [[0.2, 0.3, 0.5], [0.4, 0.3, 0.3]])
    routing = counter.result()
    assert routing.measure == "weight"
    assert routing.tables["a"][0] == pytest.approx([0.3, 0.3, 0.4])


def test_layers_are_sorted_and_missing_columns_are_empty():
    counter = RoutingCounter()
    counter.add("a", 7, ("q", "k"), [[1.0, 0.0]])
    counter.add("a", 2, ("k", "v"), [[1.0, 0.0]])
    routing = counter.result()
    assert routing.layers == (2, 7)
    assert routing.columns == ("q", "k", "v")
    expected = [[np.nan, 1.0, 0.0], [1.0, 0.0, np.nan]]
    np.testing.assert_array_equal(routing.tables["a"], expected)


def test_several_routers_in_a_layer_are_averaged():
    counter = RoutingCounter()
    counter.add("a", 0, ("0", "1"), [[1.0, 0.0]])
    counter.add("a", 0, ("0", "1"), [[0.0, 1.0]])
    assert counter.result().tables["a"].tolist() == [[0.5, 0.5]]


def test_the_difference_is_taken_from_the_mean_of_the_tasks():
    counter = RoutingCounter()
    counter.add("a", 0, ("q", "k"), [[1.0, 0.0]])
    counter.add("b", 0, ("q", "k"), [[0.0, 1.0]])
    routing = counter.result()
    assert routing.difference("a").tolist() == [[0.5, -0.5]]
    assert routing.share("b").tolist() == [0.0, 1.0]


def test_entropy_is_one_when_undecided_and_zero_when_sure():
    probs = np.array([[0.25] * 4, [1.0, 0.0, 0.0, 0.0], [0.5, 0.5, 0.0, 0.0]])
    assert normalised_entropy(probs) == pytest.approx([1.0, 0.0, 0.5])
    assert normalised_entropy(3 * probs) == pytest.approx([1.0, 0.0, 0.5])


def test_entropy_is_that_of_the_probabilities_before_selection():
    counter = RoutingCounter()
    counter.add("a", 0, ("q", "k"), gates=[[1.0, 0.0]], probs=[[0.5, 0.5]])
    assert counter.result().entropy["a"] == pytest.approx([1.0])


def test_gates_that_do_not_fit_their_columns_are_refused():
    with pytest.raises(ValueError, match=r"gates must be \[n, 3\].*got \[1, 2\]"):
        RoutingCounter().add("a", 0, COLUMNS, [[1.0, 0.0]])


def test_a_model_without_router_is_refused():
    counter = RoutingCounter()
    counter.count("a", 3)
    with pytest.raises(ValueError, match="no routing was recorded"):
        counter.result()


def test_the_plain_form_is_json_with_null_for_empty_cells():
    counter = RoutingCounter()
    counter.add("a", 0, ("q",), [[1.0]])
    counter.add("a", 1, ("k",), [[0.0]])
    plain = counter.result().to_dict()
    json.dumps(plain, allow_nan=False)
    assert plain["tasks"]["a"]["table"] == [[1.0, None], [None, 0.0]]
