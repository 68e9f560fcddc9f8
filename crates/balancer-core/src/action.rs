//! What a review asks for: to place an executor, to release or withdraw one, or to learn a driver's policy.

use crate::capacity::Capacity;
use crate::conventions::Conventions;
use crate::decide::Ordinal;
use crate::pod::{Pod, PodSpec};
use crate::policy::{InvalidField, PolicyOverrides};
use crate::ratio::SpotRatio;
use crate::review::{Operation, Review};

/// The longest name that Kubernetes accepts, in bytes. Namespaces, label values and uids are shorter.
const MAX_NAME_BYTES: usize = 253;

/// A job, identified by its namespace and the value of its job id label.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct JobRef<'a> {
    /// The namespace.
    pub namespace: &'a str,
    /// The value of the job id label, or what [`JobId::of_driver`] makes of it.
    pub app_id: &'a str,
}

impl JobRef<'_> {
    /// The same job, owned.
    pub fn to_job_id(self) -> JobId {
        JobId { namespace: self.namespace.to_owned(), app_id: self.app_id.to_owned() }
    }

    /// The value of the job id label of the job's pods.
    pub fn label_value(&self) -> &str {
        self.app_id.split_once('/').map_or(self.app_id, |(label_value, _)| label_value)
    }

    /// The name of the driver, if this is one of several jobs with one job id. See [`JobId::of_driver`].
    pub fn driver(&self) -> Option<&str> {
        self.app_id.split_once('/').map(|(_, driver)| driver)
    }
}

/// An owned [`JobRef`].
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct JobId {
    /// The namespace.
    pub namespace: String,
    /// The value of the job id label, or what [`JobId::of_driver`] makes of it.
    pub app_id: String,
}

impl JobId {
    /// The job of one of several live drivers that have the same job id. It is identified by the job id and the driver's
    /// name, with a slash between them, which the value of a label cannot contain.
    pub fn of_driver(job: JobRef<'_>, driver: &str) -> Self {
        Self { namespace: job.namespace.to_owned(), app_id: format!("{}/{driver}", job.app_id) }
    }

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
    /// An executor is created that was placed in an earlier call of the same admission, and that another webhook has opted out
    /// since: release it, and remove what was added to it.
    Withdraw(Executor<'a>),
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
    /// The executor itself states that it is opted out.
    OptedOut,
    /// A name, namespace, job id or uid longer than Kubernetes accepts, or a job id with a slash. The apiserver will
    /// refuse the pod.
    InvalidName,
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
    /// The name of the pod that owns the executor: its driver.
    pub driver: Option<&'a str>,
    /// What the fallback formula uses.
    pub ordinal: Ordinal<'a>,
    /// The capacity that the pod requires; `None` if it is deleted.
    pub required: Option<Capacity>,
    /// Whether the pod requires that capacity only because Spot Balancer has placed it on it in an earlier call of the same
    /// admission.
    pub is_placed: bool,
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
    /// The job. A driver of many jobs, such as a Spark Connect server, has no job id.
    pub job: Option<JobRef<'a>>,
    /// The pod's name; `None` if the apiserver generates it.
    pub name: Option<&'a str>,
    /// The policy fields that the driver's annotations state.
    pub overrides: PolicyOverrides,
    /// The fields whose values are invalid.
    pub invalid: Vec<InvalidField>,
    /// The pod.
    pub pod: &'a Pod<'a>,
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
        if conventions.is_driver_role(role) {
            if request.operation != Operation::Create {
                return Err(IgnoreReason::OtherOperation);
            }
            let job = conventions.job(pod).map(|(_, id)| JobRef { namespace, app_id: id });
            let name = pod.metadata.name.as_deref().filter(|name| !name.is_empty());
            let id = job.map_or("", |job| job.app_id);
            check_names(id, &[namespace, name.unwrap_or_default()])?;
            let (overrides, invalid) = conventions.overrides(pod);
            return Ok(Self::Learn(Driver { job, name, overrides, invalid, pod }));
        }
        if role != conventions.executor_role_value {
            return Err(IgnoreReason::OtherRole);
        }
        let (job_label, id) = conventions.job(pod).ok_or(IgnoreReason::NoJobId)?;
        let creating = request.operation == Operation::Create;
        if creating && pod.spec.as_ref().is_some_and(PodSpec::is_bound) {
            return Err(IgnoreReason::Bound);
        }
        let name = [&pod.metadata.name, &request.name]
            .into_iter()
            .find_map(|name| name.as_deref().filter(|name| !name.is_empty()));
        // What a pod requires is expensive to find, and its deletion needs no placement.
        let required = if creating { conventions.profile().required_capacity(pod) } else { None };
        let was_placed = creating && conventions.profile().was_placed(pod, required);
        let placeholder = match (creating, name) {
            // On reinvocation the pod has the id of the first call. The uid of the request is another one in each call.
            (true, None) => Some(conventions.placeholder(pod).filter(|_| was_placed).unwrap_or(&request.uid)),
            (true, Some(_)) => None,
            (false, _) => conventions.placeholder(pod),
        };
        let key = placeholder.or(name).unwrap_or(&request.uid);
        let uid = pod.metadata.uid.as_deref().filter(|uid| !uid.is_empty());
        let driver = pod.owner().map(|owner| owner.name.as_str());
        check_names(id, &[namespace, key, uid.unwrap_or_default(), driver.unwrap_or_default()])?;
        let (overrides, invalid) = conventions.overrides(pod);
        // One that was opted out after its placement is still in the ledger, and leaves it.
        let is_opted_out = creating && overrides.spot_ratio == Some(SpotRatio::Off);
        if is_opted_out && !was_placed {
            return Err(IgnoreReason::OptedOut);
        }
        let executor = Executor {
            job: JobRef { namespace, app_id: id },
            job_label,
            key,
            placeholder,
            uid,
            driver,
            ordinal: pod
                .label("spark-exec-id")
                .and_then(|id| id.parse().ok())
                .map_or(Ordinal::Name(key), Ordinal::Number),
            required,
            is_placed: required.is_some() && conventions.is_placed_on(pod, required),
            overrides,
            invalid,
            pod,
        };
        Ok(match (creating, is_opted_out) {
            (true, false) => Self::Place(executor),
            (true, true) => Self::Withdraw(executor),
            (false, _) => Self::Release(executor),
        })
    }
}

impl Conventions {
    /// Whether what Spot Balancer has added to the pod is all that requires this capacity.
    fn is_placed_on(&self, pod: &Pod<'_>, required: Option<Capacity>) -> bool {
        // Few pods have a decision already, and the requirements are expensive.
        if self.decision(pod).is_none() {
            return false;
        }
        let requirements = self.profile().requirements(pod);
        requirements.placed == required && requirements.own_capacity != required
    }
}

/// Whether Kubernetes may accept these names. A slash in a job id would name the job of another driver: see
/// [`JobId::of_driver`].
fn check_names(job_id: &str, others: &[&str]) -> Result<(), IgnoreReason> {
    let is_too_long = |text: &str| text.len() > MAX_NAME_BYTES;
    if is_too_long(job_id) || job_id.contains('/') || others.iter().any(|text| is_too_long(text)) {
        return Err(IgnoreReason::InvalidName);
    }
    Ok(())
}
