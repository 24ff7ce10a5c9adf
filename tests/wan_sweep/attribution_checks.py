"""What has to hold of every attribution.json, whatever was run."""

import json
from typing import Any

PEAK_KEYS = {
    *("scope", "phase", "step", "block", "module", "operation"),
    *("allocated_bytes", "named_bytes", "unattributed_bytes", "weights", "activation_bytes"),
    *("live", "num_live", "rest_bytes"),
}
OOM_KEYS = PEAK_KEYS | {"request_bytes", "reason"}
ITEM_KEYS = {
    *("bytes", "count", "kind", "component", "phase", "step", "block", "module", "operation"),
    *("shape", "dtype", "parameter"),
}
KINDS = {"weights", "activation", "workspace", "unattributed"}


def inconsistencies(result: dict[str, Any]) -> list[str]:
    """What is wrong with it; nothing, if all is well."""
    peaks = result["peaks"] + ([] if result["oom"] is None else [result["oom"]])
    found = [f"{peak['scope']} {peak['phase']}: {problem}" for peak in peaks for problem in _problems(peak)]
    scopes = [peak["scope"] for peak in result["peaks"]]
    if scopes != ["run"] + ["phase"] * (len(scopes) - 1):
        found.append(f"scopes are {scopes}")
    if json.loads(json.dumps(result)) != result:
        found.append("JSON changes it")
    return found


def _problems(peak: dict[str, Any]) -> list[str]:
    live = peak["live"]
    unattributed = sum(item["bytes"] for item in live if item["kind"] == "unattributed")
    weights = sum(item["bytes"] for item in live if item["kind"] == "weights")
    is_listed_whole = peak["rest_bytes"] == 0
    rules = {
        "keys": set(peak) == (OOM_KEYS if peak["scope"] == "oom" else PEAK_KEYS),
        "keys of items": all(set(item) == ITEM_KEYS for item in live),
        "kinds": all(item["kind"] in KINDS for item in live),
        "sum of live": peak["allocated_bytes"] == sum(item["bytes"] for item in live) + peak["rest_bytes"],
        "named": peak["allocated_bytes"] == peak["named_bytes"] + peak["unattributed_bytes"],
        "unattributed": peak["unattributed_bytes"] == unattributed,
        "weights and activations": peak["allocated_bytes"] == sum(peak["weights"].values()) + peak["activation_bytes"],
        "weights": weights == sum(peak["weights"].values()) or not is_listed_whole,
        "count": (sum(item["count"] for item in live) == peak["num_live"]) == is_listed_whole,
        "length": len(live) <= 200,
        "order": [item["bytes"] for item in live] == sorted((item["bytes"] for item in live), reverse=True),
    }
    return [rule for rule, holds in rules.items() if not holds]
