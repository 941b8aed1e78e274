//! Whole-system tests: real control plane, real node agents, real Docker. What they share is here.
