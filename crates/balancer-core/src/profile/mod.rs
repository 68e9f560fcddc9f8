//! What spot means in this cluster: which capacity a node has, which capacity a pod requires, and what a pod
//! needs to run on a capacity.

mod apply;
mod describe;
mod fallback;
mod matching;
mod node;
mod request;
mod required;
mod spread;

use crate::capacity::Capacity;
use crate::conventions::Conventions;

/// What a pod requires of its node, in words for people such as `karpenter.sh/capacity-type in (spot)`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NodeRequirements {
    /// The capacity that Spot Balancer's own requirements stand for; `None` if the pod has none of them.
    pub placed: Option<Capacity>,
    /// What Spot Balancer has added.
    pub ours: Vec<String>,
    /// What the pod requires by itself.
    pub own: Vec<String>,
    /// The capacity that the pod requires by itself.
    pub own_capacity: Option<Capacity>,
}

/// The only reader of the capacity type label. See [`Conventions::profile`].
#[derive(Clone, Copy, Debug)]
pub struct Profile<'a>(&'a Conventions);

impl Conventions {
    /// What spot means in this cluster.
    pub const fn profile(&self) -> Profile<'_> {
        Profile(self)
    }
}
