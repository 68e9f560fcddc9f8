//! What a watch reports. The names are those of kube's `watcher::Event`, with two added.

use std::sync::Arc;
use std::time::Duration;

use super::node::WatchedNode;
use super::pod::WatchedPod;
use crate::metrics::WatchedLabel;

/// What happened to the objects of one source.
pub(crate) enum Event<K> {
    /// A list starts.
    Init,
    /// The list contains this object.
    InitApply(K),
    /// The list is complete: objects that it did not contain are gone.
    InitDone,
    /// Another list starts, while the watch goes on.
    Relist,
    /// That list contains this object.
    RelistApply(K),
    /// That list is complete.
    RelistDone,
    /// That list failed, and why.
    RelistFailed(WatchError),
    /// An object was added or changed.
    Apply(K),
    /// An object was deleted.
    Delete(K),
    /// Changes are no longer reported, and why.
    Disconnected(WatchError),
    /// Changes are reported again, starting with those that were missed.
    Resumed,
}

/// An event, and its source.
#[expect(clippy::large_enum_variant, reason = "boxing each pod would cost more than the space")]
pub(crate) enum ClusterEvent {
    /// Of the pods of a namespace; of all namespaces if `None`.
    Pods(Option<Arc<str>>, Event<WatchedPod>),
    Nodes(Event<WatchedNode>),
}

/// A set of objects that is listed and watched.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Source {
    /// The pods of a namespace; of all namespaces if `None`.
    Pods(Option<Arc<str>>),
    Nodes,
}

impl Source {
    /// The resource and the namespace, as logs name them.
    pub(crate) fn names(&self) -> (&'static str, Option<&str>) {
        match self {
            Self::Pods(namespace) => (WatchedLabel::Pods.as_str(), namespace.as_deref()),
            Self::Nodes => (WatchedLabel::Nodes.as_str(), None),
        }
    }
}

/// Why a watch ended.
#[derive(Debug, thiserror::Error)]
pub(crate) enum WatchError {
    #[error("the reconciler no longer receives events")]
    ReceiverDropped,
    /// The resource version to resume from is too old; only a new list helps.
    #[error("the Kubernetes API no longer has the resource version to resume from")]
    Expired,
    #[error(transparent)]
    Api(Box<kube::Error>),
    /// The API reported an error in the middle of a watch.
    #[error("the Kubernetes API ended the watch: {0}")]
    Ended(String),
    #[error("the Kubernetes API did not answer within {0:?}")]
    TimedOut(Duration),
    #[error("the list did not end within {0:?}")]
    ListTooSlow(Duration),
    /// The API keeps the state that a list has begun with for some minutes only.
    #[error("the Kubernetes API no longer has the rest of the list, which took too long")]
    ListExpired,
}

impl From<kube::Error> for WatchError {
    fn from(error: kube::Error) -> Self {
        match error {
            kube::Error::Api(status) if status.code == 410 => Self::Expired,
            error => Self::Api(Box::new(error)),
        }
    }
}
