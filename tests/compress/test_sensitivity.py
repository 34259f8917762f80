"""What each layer costs alone."""

from __future__ import annotations

import torch
from torch import nn

from kd.compress.quantize import begin
from kd.compress.sensitivity import sensitivity


def test_a_layer_whose_weights_differ_most_costs_most_and_alone() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 6, bias=False), nn.Linear(6, 6, bias=False))
    # One weight far above the others: they all become 0.
    net[1].weight.data[:, 0] = 100.0
    images = torch.randn(40, 6)
    targets = net(images).argmax(dim=1)
    begin(net, "weights", 4, None, {"0": None, "1": None})
    exact, report = sensitivity(net, ["0", "1"], [images[:30], images[30:]], targets)
    assert exact == 1.0 and list(report) == ["0", "1"]
    assert report["1"]["accuracy"] < report["0"]["accuracy"] <= 1.0
    wanted = net[1].weight @ torch.eye(6)
    assert torch.equal(wanted, net[1].weight)  # the net is as it was
    net[0].quant.active = False
    with torch.no_grad():
        found = net(images)
        net[1].quant.active = False
        error = (found - net(images)).norm() / net(images).norm()
    assert report["1"]["error"] == float(error) or abs(report["1"]["error"] - float(error)) < 1e-6
