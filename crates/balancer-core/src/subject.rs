//! What a review is about: which executor of which job is created or deleted, or which driver
//! states a policy.

use crate::capacity::Capacity;
use crate::conventions::Conventions;
use crate::decide::Ordinal;
use crate::pin::pinned;
use crate::pod::Pod;
use crate::policy::{Invalid, Stated};
use crate::review::{Operation, Review};

/// The longest name that Kubernetes accepts; namespaces, label values and uids are shorter.
const MOST_BYTES: usize = 253;

/// A job: its namespace, and its id within it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct JobId<'a> {
    /// The namespace.
    pub namespace: &'a str,
    /// The value of the job id label.
    pub id: &'a str,
}

impl JobId<'_> {
    /// The same, to keep.
    pub fn to_key(self) -> JobKey {
        JobKey { namespace: self.namespace.to_owned(), id: self.id.to_owned() }
    }
}

/// A [`JobId`] of one's own.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct JobKey {
    /// The namespace.
    pub namespace: String,
    /// The value of the job id label.
    pub id: String,
}

impl JobKey {
    /// The job.
    pub fn id(&self) -> JobId<'_> {
        JobId { namespace: &self.namespace, id: &self.id }
    }
}

/// What a review is about.
#[derive(Clone, Debug, PartialEq)]
pub struct Subject<'a> {
    /// What is to be done.
    pub work: Work<'a>,
    /// Whether nothing may be written.
    pub dry_run: bool,
}

/// What is to be done about a review.
#[derive(Clone, Debug, PartialEq)]
pub enum Work<'a> {
    /// An executor is created: place it.
    Place(Executor<'a>),
    /// An executor is deleted: release it.
    Release(Executor<'a>),
    /// A driver is created: learn its policy.
    Learn(Driver<'a>),
    /// Nothing of ours.
    Leave(Leave),
}

/// Why a review is left alone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Leave {
    /// Not a pod, or a part of one such as its eviction.
    NotAPod,
    /// A pod of another role.
    OtherRole,
    /// An update, a connection, or the deletion of a driver.
    OtherOperation,
    /// No job id label.
    NoJob,
    /// A name, namespace, job id or uid longer than Kubernetes accepts: the pod will be refused.
    TooLong,
    /// The executor is bound to a node already: a selector could only make the node reject it. The
    /// reconciler counts it by its node.
    Bound,
}

/// An executor that is created or deleted.
#[derive(Clone, Debug, PartialEq)]
pub struct Executor<'a> {
    /// Its job.
    pub job: JobId<'a>,
    /// The label that told the job; its driver carries the same.
    pub job_label: &'a str,
    /// Its key in the ledger: its name, or [`Executor::stamp`].
    pub key: &'a str,
    /// The id that stands for the name that the apiserver has yet to make; written into the decision
    /// annotation, so that the pod can be matched later.
    pub stamp: Option<&'a str>,
    /// The pod's uid; known once it exists.
    pub uid: Option<&'a str>,
    /// By what it is decided without a ledger.
    pub ordinal: Ordinal<'a>,
    /// The capacity that it fixes itself.
    pub pinned: Option<Capacity>,
    /// What its own annotations validly state.
    pub stated: Stated,
    /// What they state and we cannot read.
    pub invalid: Vec<Invalid>,
    /// The pod.
    pub pod: &'a Pod<'a>,
}

/// A driver that is created.
#[derive(Clone, Debug, PartialEq)]
pub struct Driver<'a> {
    /// Its job.
    pub job: JobId<'a>,
    /// What its annotations validly state.
    pub stated: Stated,
    /// What they state and we cannot read.
    pub invalid: Vec<Invalid>,
}

impl<'a> Subject<'a> {
    /// Finds what `review` is about.
    pub fn of(review: &'a Review<'a>, conventions: &'a Conventions) -> Self {
        let work = Work::of(review, conventions).unwrap_or_else(Work::Leave);
        Self { work, dry_run: review.is_dry_run() }
    }
}

impl<'a> Work<'a> {
    fn of(review: &'a Review<'a>, conventions: &'a Conventions) -> Result<Self, Leave> {
        let request = &review.request;
        if !request.is_for_a_pod() {
            return Err(Leave::NotAPod);
        }
        let pod = match request.operation {
            Operation::Create => request.object.as_ref(),
            Operation::Delete => request.old_object.as_ref(),
            Operation::Other => return Err(Leave::OtherOperation),
        };
        let pod = pod.ok_or(Leave::NotAPod)?;
        let namespace = request.namespace.as_deref().or(pod.metadata.namespace.as_deref()).unwrap_or_default();
        let role = pod.label(&conventions.role_label).unwrap_or_default();
        if role == conventions.driver_role {
            if request.operation != Operation::Create {
                return Err(Leave::OtherOperation);
            }
            let (_, id) = conventions.job(pod).ok_or(Leave::NoJob)?;
            if namespace.len() > MOST_BYTES || id.len() > MOST_BYTES {
                return Err(Leave::TooLong);
            }
            let (stated, invalid) = conventions.stated(pod);
            return Ok(Self::Learn(Driver { job: JobId { namespace, id }, stated, invalid }));
        }
        if role != conventions.executor_role {
            return Err(Leave::OtherRole);
        }
        let (job_label, id) = conventions.job(pod).ok_or(Leave::NoJob)?;
        let creating = request.operation == Operation::Create;
        let spec = pod.spec.as_ref();
        if creating && spec.and_then(|spec| spec.node_name.as_deref()).is_some_and(|node| !node.is_empty()) {
            return Err(Leave::Bound);
        }
        let name = [&pod.metadata.name, &request.name]
            .into_iter()
            .find_map(|name| name.as_deref().filter(|name| !name.is_empty()));
        let stamp = match (creating, name) {
            // A reinvoked admission finds the id that we gave it first.
            (true, None) => Some(conventions.stamp(pod).unwrap_or(&request.uid)),
            (true, Some(_)) => None,
            (false, _) => conventions.stamp(pod),
        };
        let key = stamp.or(name).unwrap_or(&request.uid);
        let uid = pod.metadata.uid.as_deref().filter(|uid| !uid.is_empty());
        if [namespace, id, key, uid.unwrap_or_default()].iter().any(|text| text.len() > MOST_BYTES) {
            return Err(Leave::TooLong);
        }
        let (stated, invalid) = conventions.stated(pod);
        let executor = Executor {
            job: JobId { namespace, id },
            job_label,
            key,
            stamp,
            uid,
            ordinal: pod
                .label("spark-exec-id")
                .and_then(|id| id.parse().ok())
                .map_or(Ordinal::Name(key), Ordinal::Number),
            pinned: spec.and_then(|spec| pinned(spec, &conventions.capacity_label)),
            stated,
            invalid,
            pod,
        };
        Ok(if creating { Self::Place(executor) } else { Self::Release(executor) })
    }
}

impl Conventions {
    /// The first job id label that the pod carries, and the job id that it tells.
    pub fn job<'a>(&'a self, pod: &'a Pod<'_>) -> Option<(&'a str, &'a str)> {
        self.job_id_labels
            .iter()
            .find_map(|label| Some((label.as_str(), pod.label(label).filter(|id| !id.is_empty())?)))
    }

    /// What the pod's annotations state of a policy.
    pub fn stated(&self, pod: &Pod<'_>) -> (Stated, Vec<Invalid>) {
        Stated::read(pod.annotation(&self.ratio_annotation), pod.annotation(&self.base_annotation))
    }

    /// The id that was stamped on an executor which had no name yet: the part of its decision past
    /// the capacity.
    pub fn stamp<'a>(&self, pod: &'a Pod<'_>) -> Option<&'a str> {
        // A name that its maker chose is the key, whatever a copied annotation says.
        pod.metadata.generate_name.as_deref().filter(|prefix| !prefix.is_empty())?;
        self.decision(pod)?.1.filter(|id| !id.is_empty())
    }

    /// What the decision annotation says: the capacity, and the id that stands for a name.
    pub(crate) fn decision<'a>(&self, pod: &'a Pod<'_>) -> Option<(Capacity, Option<&'a str>)> {
        let decision = pod.annotation(self.decision_annotation.as_deref()?)?;
        let (capacity, id) = decision.split_once('/').map_or((decision, None), |(capacity, id)| (capacity, Some(id)));
        Some((Capacity::parse(capacity)?, id))
    }
}
