//! An explanation, step by step: the job, its policy, the decision, the state now, and what would change it. Pure.

use std::io::{self, Write};

use balancer_core::{
    Capacity, Conventions, ExecutorPod, InvalidField, JobId, JobPod, Pod, PolicyField, PolicyOverrides,
};
use balancer_reconcile::index::DriverRef;
use k8s_openapi::api::core::v1;
use serde::Serialize;

use crate::output::{percent, printable};
use crate::settings::Origin;
use crate::snapshot::read::core_pod;
use crate::snapshot::{JobPolicy, Missing, RatioSource, Snapshot, SpotState};
use crate::status::job::{JobStatus, Profile, share_of};

/// Why a pod runs, or waits, where it does.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Explanation {
    pub(crate) namespace: String,
    pub(crate) pod: String,
    pub(crate) outcome: Outcome,
    pub(crate) job: Option<String>,
    /// The pod that drives the job.
    pub(crate) driver: Option<String>,
    /// What was decided, or what the pod requires by itself.
    pub(crate) capacity: Option<&'static str>,
    pub(crate) node: Option<String>,
    pub(crate) node_capacity: Option<&'static str>,
    pub(crate) steps: Vec<Step>,
    pub(crate) settings: Profile,
    pub(crate) missing: Vec<Missing>,
}

/// What the webhook has done with a pod.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) enum Outcome {
    /// An executor was sent to a capacity.
    Placed,
    /// An executor requires a capacity by itself, and was left alone.
    Fixed,
    /// An executor, or its job, is opted out.
    OptedOut,
    /// An executor has no job id.
    NoJobId,
    /// An executor that should have been placed was not.
    NotPlaced,
    /// The webhook leaves no mark on what it has placed, by its settings.
    NotRecorded,
    /// A driver: its policy was read.
    Driver,
    /// A pod that owns the executors of jobs without a driver, such as a notebook.
    Owner,
    /// No driver and no executor.
    OtherRole,
}

/// A sentence or more about one question.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(crate) struct Step {
    pub(crate) about: About,
    pub(crate) text: String,
}

/// The question that a step answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) enum About {
    /// Which job is it of?
    Job,
    /// Which ratio does the job have, and from where?
    Policy,
    /// What did the webhook decide, and write?
    Decision,
    /// Where is it now?
    Now,
    /// What was the driver told?
    Warning,
    /// What would change it?
    Change,
}

/// What an explanation is made of.
pub(super) struct Subject<'s> {
    pub(super) snapshot: &'s Snapshot,
    /// As the API has it.
    pub(super) pod: &'s v1::Pod,
    /// As the webhook reads it.
    pub(super) core: &'s Pod<'static>,
    pub(super) job: Option<JobId>,
    /// How the job stands, if it has a live pod.
    pub(super) status: Option<JobStatus>,
    pub(super) driver: Option<DriverRef>,
    pub(super) policy: JobPolicy<'s>,
    /// What the executor itself states.
    pub(super) own: PolicyOverrides,
    pub(super) own_invalid: Vec<InvalidField>,
    pub(super) outcome: Outcome,
    pub(super) capacity: Option<Capacity>,
}

impl About {
    fn title(self) -> &'static str {
        match self {
            Self::Job => "Job",
            Self::Policy => "Policy",
            Self::Decision => "Decision",
            Self::Now => "Now",
            Self::Warning => "Warning",
            Self::Change => "To change it",
        }
    }
}

impl Step {
    /// Annotations and Events are in the text, so it may contain anything.
    fn new(about: About, text: &str) -> Self {
        Self { about, text: printable(text) }
    }
}

impl Explanation {
    /// Explains a pod of the snapshot's cluster; `None` if it is no valid pod.
    pub(crate) fn of(snapshot: &Snapshot, pod: &v1::Pod) -> Option<Self> {
        let core = core_pod(pod)?;
        let subject = Subject::of(snapshot, pod, &core);
        let mut steps = vec![Step::new(About::Job, &subject.job_words())];
        let mut add = |about, texts: Vec<String>| steps.extend(texts.iter().map(|text| Step::new(about, text)));
        if !matches!(subject.outcome, Outcome::OtherRole | Outcome::NoJobId) {
            add(About::Policy, subject.policy_words());
        }
        add(About::Decision, subject.decision_words());
        add(About::Now, subject.now_words());
        add(About::Warning, subject.warnings());
        add(About::Change, subject.changes());
        let node = subject.node().map(str::to_owned);
        let (job, driver) = (subject.job.as_ref(), subject.driver.as_ref());
        Some(Self {
            namespace: core.metadata.namespace.as_deref()?.to_owned(),
            pod: core.metadata.name.as_deref()?.to_owned(),
            outcome: subject.outcome,
            job: job.map(|job| job.app_id.clone()),
            driver: driver.map(|driver| driver.name.clone()),
            capacity: subject.capacity.map(Capacity::as_str),
            node_capacity: subject.node_capacity().map(Capacity::as_str),
            node,
            steps,
            settings: Profile::of(&snapshot.settings),
            missing: snapshot.missing(),
        })
    }

    /// Writes the steps as lines under their titles.
    pub(crate) fn write(&self, out: &mut impl Write, is_wide: bool) -> io::Result<()> {
        writeln!(out, "Pod {}/{}", self.namespace, self.pod)?;
        let mut last = None;
        for Step { about, text } in &self.steps {
            if last != Some(*about) {
                writeln!(out, "\n{}:", about.title())?;
            }
            last = Some(*about);
            writeln!(out, "  {text}")?;
        }
        if is_wide {
            writeln!(out, "\n{}", self.settings.words())?;
        }
        Ok(())
    }
}

impl<'s> Subject<'s> {
    fn of(snapshot: &'s Snapshot, pod: &'s v1::Pod, core: &'s Pod<'static>) -> Self {
        let conventions = &snapshot.settings.conventions;
        let index = snapshot.index();
        let namespace = core.metadata.namespace.as_deref().unwrap_or_default();
        let name = core.metadata.name.as_deref().unwrap_or_default();
        let role = core.label(&conventions.workload_role_label).unwrap_or_default();
        let is_driver = conventions.is_driver_role(role);
        let app_id = conventions.job(core).map(|(_, id)| id);
        let stated = app_id.map(|id| JobId { namespace: namespace.to_owned(), app_id: id.to_owned() });
        // Of several drivers with one job id, each drives the job whose driver it is.
        let driven = || {
            index
                .jobs()
                .find(|job| index.driver(job).is_some_and(|driver| driver.name == name && job.namespace == namespace))
        };
        let owns = !is_driver && driven().is_some();
        let job = if is_driver || owns { driven().cloned() } else { index.job_of_executor(namespace, name) };
        let job = job.map(|job| JobId::clone(&job)).or(stated);
        let itself = || {
            let uid = core.metadata.uid.as_deref()?.to_owned();
            (is_driver || owns).then(|| DriverRef { namespace: namespace.to_owned(), name: name.to_owned(), uid })
        };
        let owner = || {
            let owner = core.owner()?;
            Some(DriverRef {
                namespace: namespace.to_owned(),
                name: owner.name.to_string(),
                uid: owner.uid.to_string(),
            })
        };
        let driver = itself().or_else(|| index.driver(job.as_ref()?)).or_else(owner);
        let policy = snapshot.policy(driver.as_ref());
        let (own, own_invalid) = if is_driver || owns { Default::default() } else { conventions.overrides(core) };
        let status = job.as_ref().filter(|job| index.contains(job)).map(|job| JobStatus::of_one(snapshot, &index, job));
        let (outcome, capacity) = match outcome(core, role, &own, &policy, conventions) {
            (Outcome::OtherRole, _) if owns => (Outcome::Owner, None),
            found => found,
        };
        Self { snapshot, pod, core, job, status, driver, policy, own, own_invalid, outcome, capacity }
    }

    pub(super) fn conventions(&self) -> &'s Conventions {
        &self.snapshot.settings.conventions
    }

    fn job_words(&self) -> String {
        let Conventions { workload_role_label, job_id_label, .. } = self.conventions();
        let role = self.core.label(workload_role_label);
        let driver = self.driver.as_ref().map(|driver| driver.name.as_str());
        match (&self.job, self.outcome) {
            (_, Outcome::OtherRole) => match role {
                Some(role) => {
                    format!("None: its label {workload_role_label} is {role:?}, which is no driver and no executor.")
                }
                None => format!("None: it has no label {workload_role_label}, so it is no driver and no executor."),
            },
            (Some(job), Outcome::Owner) => format!(
                "It owns the executors of the job {}, which has no driver pod: Spark runs in client mode there.",
                job.app_id
            ),
            (None, Outcome::Driver) => "It drives jobs, and has no job id of its own.".into(),
            (Some(job), Outcome::Driver) => format!("It drives the job {}.", job.app_id),
            (None, _) => format!("None: it is an executor without a job id (label {}).", job_id_label.join(" or ")),
            (Some(job), _) => match driver {
                Some(driver) => format!("Executor of the job {}, which {driver} drives.", job.app_id),
                None => format!("Executor of the job {}. No pod owns it, and the job has no driver.", job.app_id),
            },
        }
    }

    fn policy_words(&self) -> Vec<String> {
        let conventions = self.conventions();
        let JobPolicy { source, fields, invalid, .. } = &self.policy;
        let annotation = conventions.annotation(PolicyField::SpotRatio);
        let driver = self.driver.as_ref().map_or("the driver", |driver| &driver.name);
        let ratio = match (fields.spot_ratio, source) {
            (_, RatioSource::Invalid) => "An invalid ratio".into(),
            (Some(ratio), _) => match ratio.share() {
                Some(share) => format!("{} of the executors on spot", percent(share_of(share))),
                None => "Opted out (off)".into(),
            },
            (None, _) => "An unknown ratio".into(),
        };
        let source = match source {
            RatioSource::Driver => format!("the annotation {annotation} on the driver {driver}"),
            RatioSource::Owner => format!("the annotation {annotation} on {driver}, which owns the executors"),
            RatioSource::Default => match &self.snapshot.settings.origin {
                Origin::Deployment { .. } => format!("the default of the installation, because {driver} states none"),
                Origin::Defaults { .. } => {
                    format!("the default of the installation, which was not read; {driver} states none")
                }
            },
            RatioSource::Invalid => format!("{driver} states it; the value before it, or the default, is in use"),
            RatioSource::NotRead => format!("{driver} was not read. It may state one; else it is the default"),
            RatioSource::Unknown => {
                "no live pod that drives the job was found. The ledger may still have its ratio; else it is the default"
                    .into()
            }
        };
        let mut words = vec![format!("{ratio}: {source}.")];
        match fields.on_demand_base {
            Some(0) => {}
            Some(1) => words.push("The first executor goes to on-demand; the ratio applies to the others.".into()),
            Some(base) => {
                words.push(format!("The first {base} executors go to on-demand; the ratio applies to the others."))
            }
            None => words.push("The on-demand base is unknown.".into()),
        }
        if let Some(seconds) = fields.spot_fallback_seconds.filter(|seconds| *seconds > 0) {
            words.push(format!("An executor that finds no spot for {seconds} s is replaced on on-demand."));
        }
        for (whose, invalid) in [("", invalid), ("The executor's own ", &self.own_invalid)] {
            words.extend(
                invalid.iter().map(|invalid| format!("{whose}{}: {invalid}.", conventions.annotation(invalid.field))),
            );
        }
        for (field, value) in
            [PolicyField::SpotRatio, PolicyField::OnDemandBase].map(|field| (field, self.own.value(field)))
        {
            if let Some(value) = value {
                words.push(format!(
                    "The executor states {}: {value} itself, which comes first.",
                    conventions.annotation(field)
                ));
            }
        }
        words
    }

    pub(super) fn spot_state(&self) -> SpotState {
        self.snapshot.spot_state(self.driver.as_ref(), &self.policy)
    }
}

/// What the webhook has done with the pod, and with which capacity.
fn outcome(
    core: &Pod<'_>,
    role: &str,
    own: &PolicyOverrides,
    policy: &JobPolicy<'_>,
    conventions: &Conventions,
) -> (Outcome, Option<Capacity>) {
    if conventions.is_driver_role(role) {
        return (Outcome::Driver, conventions.profile().required_capacity(core));
    }
    if role != conventions.executor_role_value {
        return (Outcome::OtherRole, None);
    }
    if conventions.job(core).is_none() {
        return (Outcome::NoJobId, None);
    }
    if let Some((capacity, _)) = conventions.decision(core) {
        // The annotation of a pod with a generated name has its key, even if the pod has chosen its capacity.
        return match JobPod::of(core, conventions) {
            Some(JobPod::Executor(ExecutorPod { fixed: Some(fixed), .. })) => (Outcome::Fixed, Some(fixed)),
            _ => (Outcome::Placed, Some(capacity)),
        };
    }
    let is_off = |fields: &PolicyOverrides| fields.spot_ratio.is_some_and(|ratio| ratio.share().is_none());
    if is_off(own) || (own.spot_ratio.is_none() && is_off(&policy.fields)) {
        return (Outcome::OptedOut, None);
    }
    match conventions.profile().required_capacity(core) {
        required if conventions.decision_annotation.is_none() => (Outcome::NotRecorded, required),
        None => (Outcome::NotPlaced, None),
        required => (Outcome::Fixed, required),
    }
}
