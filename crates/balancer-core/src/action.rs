//! What a review asks for: to place an executor, to release one, or to learn a driver's policy.

use crate::capacity::Capacity;
use crate::conventions::Conventions;
use crate::decide::Ordinal;
use crate::pod::Pod;
use crate::policy::{InvalidField, PolicyOverrides};
use crate::review::{Operation, Review};

/// The longest name that Kubernetes accepts, in bytes. Namespaces, label values and uids are shorter.
const MAX_NAME_BYTES: usize = 253;

/// A job, identified by its namespace and the value of its job id label.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct JobRef<'a> {
    /// The namespace.
    pub namespace: &'a str,
    /// The value of the job id label.
    pub app_id: &'a str,
}

impl JobRef<'_> {
    /// The same job, owned.
    pub fn to_job_id(self) -> JobId {
        JobId { namespace: self.namespace.to_owned(), app_id: self.app_id.to_owned() }
    }
}

/// An owned [`JobRef`].
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct JobId {
    /// The namespace.
    pub namespace: String,
    /// The value of the job id label.
    pub app_id: String,
}

impl JobId {
    /// The same job, borrowed.
    pub fn as_job_ref(&self) -> JobRef<'_> {
        JobRef { namespace: &self.namespace, app_id: &self.app_id }
    }
}

/// What to do about a review.
#[derive(Clone, Debug, PartialEq)]
pub enum Action<'a> {
    /// An executor is created: place it.
    Place(Executor<'a>),
    /// An executor is deleted: release it.
    Release(Executor<'a>),
    /// A driver is created: learn its policy.
    Learn(Driver<'a>),
    /// There is nothing to do.
    Ignore(IgnoreReason),
}

/// Why there is nothing to do about a review.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum IgnoreReason {
    /// Not a pod, or a subresource of a pod such as its eviction.
    NotAPod,
    /// A pod of another role.
    OtherRole,
    /// An update, a connection, or the deletion of a driver.
    OtherOperation,
    /// No job id label.
    NoJobId,
    /// A name, namespace, job id or uid longer than Kubernetes accepts. The apiserver will refuse the pod.
    TooLong,
    /// The executor is already bound to a node, and a nodeSelector could only make the node reject it. The
    /// reconciler counts it by the capacity of its node.
    Bound,
}

/// An executor that is created or deleted.
#[derive(Clone, Debug, PartialEq)]
pub struct Executor<'a> {
    /// The job.
    pub job: JobRef<'a>,
    /// The label that contained the job id. The job's driver has the same label.
    pub job_label: &'a str,
    /// The executor's key in the ledger: its name, or [`Executor::placeholder`].
    pub key: &'a str,
    /// The id that replaces the name if the apiserver generates the name after the admission. The decision
    /// annotation contains it, so that later reviews and the reconciler find the entry.
    pub placeholder: Option<&'a str>,
    /// The pod's uid; absent at creation.
    pub uid: Option<&'a str>,
    /// What the fallback formula uses.
    pub ordinal: Ordinal<'a>,
    /// The capacity that the pod requires by itself.
    pub required: Option<Capacity>,
    /// The policy fields that the executor's own annotations state.
    pub overrides: PolicyOverrides,
    /// The fields whose values are invalid.
    pub invalid: Vec<InvalidField>,
    /// The pod.
    pub pod: &'a Pod<'a>,
}

/// A driver that is created.
#[derive(Clone, Debug, PartialEq)]
pub struct Driver<'a> {
    /// The job.
    pub job: JobRef<'a>,
    /// The policy fields that the driver's annotations state.
    pub overrides: PolicyOverrides,
    /// The fields whose values are invalid.
    pub invalid: Vec<InvalidField>,
}

impl<'a> Action<'a> {
    /// What to do about `review`.
    pub fn of(review: &'a Review<'a>, conventions: &'a Conventions) -> Self {
        Self::find(review, conventions).unwrap_or_else(Self::Ignore)
    }

    fn find(review: &'a Review<'a>, conventions: &'a Conventions) -> Result<Self, IgnoreReason> {
        let request = &review.request;
        if !request.is_for_a_pod() {
            return Err(IgnoreReason::NotAPod);
        }
        let pod = match request.operation {
            Operation::Create => request.object.as_ref(),
            Operation::Delete => request.old_object.as_ref(),
            Operation::Other => return Err(IgnoreReason::OtherOperation),
        };
        let pod = pod.ok_or(IgnoreReason::NotAPod)?;
        let namespace = request.namespace.as_deref().or(pod.metadata.namespace.as_deref()).unwrap_or_default();
        let role = pod.label(&conventions.workload_role_label).unwrap_or_default();
        if role == conventions.driver_role_value {
            if request.operation != Operation::Create {
                return Err(IgnoreReason::OtherOperation);
            }
            let (_, id) = conventions.job(pod).ok_or(IgnoreReason::NoJobId)?;
            if namespace.len() > MAX_NAME_BYTES || id.len() > MAX_NAME_BYTES {
                return Err(IgnoreReason::TooLong);
            }
            let (overrides, invalid) = conventions.overrides(pod);
            return Ok(Self::Learn(Driver { job: JobRef { namespace, app_id: id }, overrides, invalid }));
        }
        if role != conventions.executor_role_value {
            return Err(IgnoreReason::OtherRole);
        }
        let (job_label, id) = conventions.job(pod).ok_or(IgnoreReason::NoJobId)?;
        let creating = request.operation == Operation::Create;
        let spec = pod.spec.as_ref();
        if creating && spec.and_then(|spec| spec.node_name.as_deref()).is_some_and(|node| !node.is_empty()) {
            return Err(IgnoreReason::Bound);
        }
        let name = [&pod.metadata.name, &request.name]
            .into_iter()
            .find_map(|name| name.as_deref().filter(|name| !name.is_empty()));
        let placeholder = match (creating, name) {
            // On reinvocation the pod has the id of the first call.
            (true, None) => Some(conventions.placeholder(pod).unwrap_or(&request.uid)),
            (true, Some(_)) => None,
            (false, _) => conventions.placeholder(pod),
        };
        let key = placeholder.or(name).unwrap_or(&request.uid);
        let uid = pod.metadata.uid.as_deref().filter(|uid| !uid.is_empty());
        if [namespace, id, key, uid.unwrap_or_default()].iter().any(|text| text.len() > MAX_NAME_BYTES) {
            return Err(IgnoreReason::TooLong);
        }
        let (overrides, invalid) = conventions.overrides(pod);
        let executor = Executor {
            job: JobRef { namespace, app_id: id },
            job_label,
            key,
            placeholder,
            uid,
            ordinal: pod
                .label("spark-exec-id")
                .and_then(|id| id.parse().ok())
                .map_or(Ordinal::Name(key), Ordinal::Number),
            required: spec.and_then(|spec| conventions.profile().required_by(spec)),
            overrides,
            invalid,
            pod,
        };
        Ok(if creating { Self::Place(executor) } else { Self::Release(executor) })
    }
}
