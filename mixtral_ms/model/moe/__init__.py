"""The mixture of experts: router, token dispatch, experts, combine."""
