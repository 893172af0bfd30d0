import math
from typing import Any, get_type_hints

import pytest

from stepbatch.bench.options import SweepOptions
from stepbatch.bench.sweep.plan import Axis, Flags, Variant, read_axes, read_command, read_variants, requests_of
from stepbatch.errors import OptionError

GROUPS = get_type_hints(Flags)


def flags(**given: Any) -> Flags:
    """All flags, those that are given by their names."""
    groups = {
        name: cls(**{field: given.pop(field) for field in [*given] if field in cls.__dataclass_fields__})
        for name, cls in GROUPS.items()
    }
    assert not given
    return Flags(**groups)


class TestAxes:
    def test_loads_are_read_in_their_order(self) -> None:
        assert read_axes(flags(request_rates="1, 2.5,0.5,2.5")) == [Axis("rate", (1.0, 2.5, 0.5))]
        assert read_axes(flags(concurrencies="1,8,4")) == [Axis("concurrency", (1.0, 8.0, 4.0))]

    def test_auto_searches(self) -> None:
        assert read_axes(flags(request_rates="auto")) == [Axis("rate", ())]
        assert read_axes(flags(concurrencies=" auto")) == [Axis("concurrency", ())]

    def test_without_either_a_rate_is_searched_for(self) -> None:
        assert read_axes(flags()) == [Axis("rate", ())]

    def test_both_will_do(self) -> None:
        axes = read_axes(flags(request_rates="auto", concurrencies="1,2"))
        assert axes == [Axis("concurrency", (1.0, 2.0)), Axis("rate", ())]

    @pytest.mark.parametrize(
        ("given", "message"),
        [
            ({"request_rates": "1,fast"}, "--request-rates must be auto or like 1,2,4,8; 'fast' is not a number"),
            ({"request_rates": "1,,2"}, "'' is not a number"),
            ({"request_rates": "1,0"}, "--request-rates must be over 0, not 0"),
            ({"request_rates": "inf"}, "--request-rates must be over 0, not inf"),
            ({"request_rates": "nan"}, "--request-rates must be over 0, not nan"),
            ({"concurrencies": "1,2.5"}, "'2.5' is not a whole number"),
            ({"concurrencies": "-1"}, "--concurrencies must be over 0, not -1"),
            ({"request_rate": 4.0}, "takes --request-rates, not --request-rate"),
            ({"concurrencies": "1", "max_concurrency": 4}, "--max-concurrency and --concurrencies"),
            ({"duration": 4.0, "num_prompts": 8}, "--duration and --num-prompts"),
        ],
    )
    def test_what_cannot_be_is_said(self, given: dict[str, Any], message: str) -> None:
        with pytest.raises(OptionError, match=message):
            read_axes(flags(**given))

    def test_the_other_kind_of_load_still_bounds_it(self) -> None:
        assert read_axes(flags(request_rates="1", max_concurrency=4))
        assert read_axes(flags(concurrencies="1", request_rate=4.0))


class TestVariants:
    def test_without_flags_there_is_one(self) -> None:
        assert read_variants(SweepOptions()) == [Variant()]

    def test_every_combination_is_one(self) -> None:
        options = SweepOptions(server_command="serve", server_flag=("size=1,4", "--mode=a,b"))
        assert read_variants(options) == [
            Variant(f"size={size}, mode={mode}", ("--size", size, "--mode", mode))
            for size in ("1", "4")
            for mode in ("a", "b")
        ]

    def test_a_flag_that_is_given_twice_has_all_the_values(self) -> None:
        options = SweepOptions(server_command="serve", server_flag=("size=1", "size=4"))
        assert [variant.name for variant in read_variants(options)] == ["size=1", "size=4"]

    @pytest.mark.parametrize("text", ["size", "size=", "=1", "--=1"])
    def test_another_form_is_refused(self, text: str) -> None:
        with pytest.raises(OptionError, match=r"--server-flag must be NAME=VALUE,VALUE,\.\.\., not "):
            read_variants(SweepOptions(server_command="serve", server_flag=(text,)))

    def test_they_need_a_server_that_is_started(self) -> None:
        with pytest.raises(OptionError, match="--server-flag is for servers that are started here"):
            read_variants(SweepOptions(server_flag=("size=1",)))
        with pytest.raises(OptionError, match="--servers is for servers that are started here"):
            read_variants(SweepOptions(servers=2))


class TestCommand:
    def test_is_split_as_a_shell_does(self) -> None:
        command = "stepbatch serve --model-path '/my models/x' --port {port}"
        words = ["stepbatch", "serve", "--model-path", "/my models/x", "--port", "{port}"]
        assert read_command(flags(server_command=command)) == words
        assert read_command(flags()) == []

    def test_quotes_that_do_not_match_are_told(self) -> None:
        with pytest.raises(OptionError, match="--server-command can't be read: no closing quotation"):
            read_command(flags(server_command="serve 'x"))

    def test_each_server_has_an_address_or_none_has(self) -> None:
        assert read_command(flags(server_command="serve", servers=2, base_url=("http://a:1", "http://a:2")))
        with pytest.raises(OptionError, match="--servers is 2, but --base-url is given 1 times"):
            read_command(flags(server_command="serve", servers=2, base_url=("http://a:1",)))


class TestRequests:
    def test_by_rate_a_run_lasts_half_a_minute(self) -> None:
        assert requests_of(flags(), "rate", 10.0, 0.0) == 300
        assert requests_of(flags(), "rate", 0.1, 0.0) == 16

    def test_by_concurrency_every_slot_has_four(self) -> None:
        assert requests_of(flags(), "concurrency", 8.0, 100.0) == 32
        assert requests_of(flags(), "concurrency", 1.0, 100.0) == 16

    def test_a_duration_is_kept_as_far_as_is_known(self) -> None:
        assert requests_of(flags(duration=5.0), "rate", 10.0, 0.0) == 50
        assert requests_of(flags(duration=5.0), "concurrency", 8.0, 20.0) == 100
        assert requests_of(flags(duration=5.0), "concurrency", 8.0, 0.0) == 32

    def test_a_number_is_that_number(self) -> None:
        assert requests_of(flags(num_prompts=3), "rate", 10.0, 0.0) == 3
        assert requests_of(flags(num_prompts=3), "concurrency", 10.0, 0.0) == 3


class TestTold:
    def test_has_every_flag(self) -> None:
        options = flags(request_rates="1,2", slo=0.0).told()
        fields = {field for cls in GROUPS.values() for field in cls.__dataclass_fields__}
        assert set(options) == fields
        assert options["request_rates"] == "1,2"
        assert not any(isinstance(value, float) and math.isinf(value) for value in options.values())

    @pytest.mark.parametrize(
        "command", ["serve --api-key s3cret --port 1", "serve --hf-token=s3cret --port 1", "env API_KEY=s3cret serve"]
    )
    def test_has_no_secrets(self, command: str) -> None:
        options = flags(server_command=command, api_key="s3cret", header=("X-Key: s3cret",)).told()
        assert "s3cret" not in str(options)
        assert "serve" in options["server_command"]
        assert "port" not in command or options["server_command"].endswith("--port 1")
