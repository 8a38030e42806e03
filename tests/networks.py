"""Networks whose batch norms hold what no initialisation would, so that a forgotten statistic shows."""

from torch import nn


def randomise_norms(network, *, bias=0.1, mean=0.1, var=(0.5, 1.5)):
    """Draw the weights and running statistics of all batch norms from torch's generator, and return the network.

    Args:
        network: changed in place.
        bias: standard deviation of the biases.
        mean: standard deviation of the running means.
        var: least and greatest running variance.
    """
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.weight.data.uniform_(0.5, 1.5)
            module.bias.data.normal_(0, bias)
            module.running_mean.normal_(0, mean)
            module.running_var.uniform_(*var)
    return network
