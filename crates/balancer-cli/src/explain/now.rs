//! Where a pod is now, what was reported about it, and what would change it.

use std::collections::BTreeMap;

use balancer_core::Pool;
use balancer_core::{Capacity, PolicyField, SpotPreference};
use balancer_reconcile::WarningReason;
use k8s_openapi::jiff::Timestamp;

use crate::output::{age, quoted};
use crate::snapshot::{Event, REPORTER, RatioSource, SPOT_CLOSED, SPOT_REOPENED, SpotState, created};

use super::words::{Outcome, Subject};

/// The reason of the Event about executors that find no node.
const UNSCHEDULABLE: &str = WarningReason::ExecutorsUnschedulable.as_str();
/// The reason of the Event about a ratio that has no effect.
const WITHOUT_EFFECT: &str = WarningReason::SpotRatioWithoutEffect.as_str();
/// What a kubelet reports is about a container, and not about the node.
const KUBELET: &str = "kubelet";

impl Subject<'_> {
    /// The node that the pod is bound to.
    pub(super) fn node(&self) -> Option<&str> {
        self.pod.spec.as_ref()?.node_name.as_deref().filter(|node| !node.is_empty())
    }

    /// The capacity of that node.
    pub(super) fn node_capacity(&self) -> Option<Capacity> {
        let node = self.snapshot.node(self.node()?)?;
        self.conventions().profile().of_node(|key| node.label(key))
    }

    fn phase(&self) -> &str {
        self.pod.status.as_ref().and_then(|status| status.phase.as_deref()).unwrap_or("Pending")
    }

    pub(super) fn now_words(&self) -> Vec<String> {
        let status = self.pod.status.as_ref();
        if matches!(self.phase(), "Succeeded" | "Failed") {
            let reason =
                status.and_then(|status| status.reason.as_deref()).map(|reason| format!(" ({})", quoted(reason)));
            let ended = if self.phase() == "Failed" { "failed" } else { "succeeded" };
            let message =
                status.and_then(|status| status.message.as_deref()).map(|message| format!(": {}", quoted(message)));
            return vec![format!(
                "It has {ended}{}{}. It does not count any more.",
                reason.unwrap_or_default(),
                message.unwrap_or_default()
            )];
        }
        let mut words = Vec::new();
        if self.pod.metadata.deletion_timestamp.is_some() {
            words.push("It is being deleted, and does not count any more.".into());
        }
        match self.node() {
            Some(node) => words.extend(self.bound_words(node)),
            None => words.extend(self.pending_words()),
        }
        words
    }

    fn bound_words(&self, node: &str) -> Vec<String> {
        let known = self.snapshot.node(node);
        let capacity = match (self.node_capacity(), known) {
            (Some(capacity), _) => capacity.as_str(),
            (None, Some(_)) => "of unknown capacity",
            (None, None) if self.snapshot.nodes.is_none() => "whose capacity may not be read",
            (None, None) => "which is gone",
        };
        let pool = known.and_then(|node| Pool::of_node(|key| node.label(key)));
        let pool = pool.map(|Pool { instance_type, zone }| format!(", {instance_type} in {zone}"));
        let mut words = vec![format!("{} on the node {node} ({capacity}{}).", self.phase(), pool.unwrap_or_default())];
        if self.outcome == Outcome::Placed
            && let (Some(decided), Some(on)) = (self.capacity, self.node_capacity())
            && decided != on
        {
            words.push(format!(
                "It was sent to {decided} and runs on {on}, so it counts as {on}. {}",
                match self.conventions().spot_preference {
                    SpotPreference::BestEffort =>
                        "With SPOT_PREFERENCE=BEST_EFFORT an executor may run on on-demand if there is no spot.",
                    SpotPreference::Strict => "The node's labels may have changed.",
                }
            ));
        }
        words
    }

    fn pending_words(&self) -> Vec<String> {
        let waits = created(self.core).map(|created| format!(" for {}", age(created, self.snapshot.now)));
        let status = self.pod.status.as_ref();
        let nominated = status.and_then(|status| status.nominated_node_name.as_deref()).filter(|node| !node.is_empty());
        let gates = self.pod.spec.as_ref().and_then(|spec| spec.scheduling_gates.as_ref());
        let what = match nominated {
            Some(node) => format!(", and the node {node} is on its way"),
            None if gates.is_some_and(|gates| !gates.is_empty()) => ", and held by a scheduling gate".into(),
            None => String::new(),
        };
        let mut words = vec![format!("Pending{}{what}.", waits.unwrap_or_default())];
        let mut said = None;
        if let Some(message) = self.core.unschedulable().filter(|message| !message.is_empty()) {
            let since = self.core.unschedulable_since().and_then(|since| since.parse::<Timestamp>().ok());
            let since = since.map(|since| format!(" for {}", age(since, self.snapshot.now)));
            words.push(format!("The scheduler finds no node{}: {}", since.unwrap_or_default(), quoted(message)));
            said = Some(quoted(message));
        }
        let uid = self.core.metadata.uid.as_deref().unwrap_or_default();
        // The scheduler says the same in the pod and in an Event.
        let is_new = |event: &Event| said.as_ref() != Some(&quoted(&event.note));
        let is_meant = |event: &Event| event.reporter != KUBELET && is_new(event);
        words.extend(self.last_events(uid, is_meant, |event| event.reporter.clone()));
        if words.len() == 1 && self.snapshot.events.is_none() {
            words.push("Why is not known here, because Events may not be read.".into());
        }
        words
    }

    /// What the reconciler has reported about the driver.
    pub(super) fn warnings(&self) -> Vec<String> {
        let Some(driver) = &self.driver else { return Vec::new() };
        let group = |event: &Event| match event.reason.as_str() {
            // The later one of the two holds.
            SPOT_CLOSED | SPOT_REOPENED => SPOT_CLOSED.to_owned(),
            other => other.to_owned(),
        };
        self.last_events(
            &driver.uid,
            |event| event.reporter == REPORTER && self.holds(event) && self.concerns(event),
            group,
        )
    }

    /// Whether the Event may be about this pod: executors that find no node are others than one that has one.
    fn concerns(&self, event: &Event) -> bool {
        event.reason != UNSCHEDULABLE || self.node().is_none()
    }

    /// Whether what the Event says of annotations is true of their values now.
    fn holds(&self, event: &Event) -> bool {
        let mut fields = PolicyField::ALL.iter().copied();
        if let Some(field) = fields.find(|field| field.event_reason() == event.reason) {
            let mut invalid = self.policy.invalid.iter().filter(|invalid| invalid.field == field);
            return invalid.any(|invalid| event.note.contains(&invalid.to_string()));
        }
        match event.note.split_once(" has no effect") {
            Some((stated, _)) if event.reason == WITHOUT_EFFECT => stated.split(", ").all(|one| self.is_current(one)),
            _ => true,
        }
    }

    /// Whether the policy has this annotation's value, unless that is not known.
    fn is_current(&self, stated: &str) -> bool {
        let Some((key, value)) = stated.split_once(": ") else { return true };
        let mut fields = PolicyField::ALL.iter().copied();
        let field = fields.find(|field| self.conventions().annotation(*field) == key);
        let now = field.and_then(|field| self.policy.fields.value(field));
        now.is_none_or(|now| now == value)
    }

    /// The last Event of each group about the pod with this uid.
    fn last_events(
        &self,
        uid: &str,
        is_meant: impl Fn(&Event) -> bool,
        group: impl Fn(&Event) -> String,
    ) -> Vec<String> {
        let mut last = BTreeMap::<String, &Event>::new();
        for event in self.snapshot.events.iter().flatten().filter(|event| event.uid == uid && is_meant(event)) {
            let known = last.entry(group(event)).or_insert(event);
            if event.at >= known.at {
                *known = event;
            }
        }
        let mut last: Vec<&Event> = last.into_values().collect();
        last.sort_by_key(|event| event.at);
        let words = |event: &&Event| {
            let age = age(event.at, self.snapshot.now);
            format!("{} {age} ago, by {}: {}", quoted(&event.reason), quoted(&event.reporter), quoted(&event.note))
        };
        last.iter().map(words).collect()
    }

    pub(super) fn changes(&self) -> Vec<String> {
        let annotation = self.conventions().annotation(PolicyField::SpotRatio);
        let driver = self.driver.as_ref().map(|driver| driver.name.as_str());
        let on_driver = driver
            .map_or("on the driver, or on the executors if they have none".to_owned(), |driver| format!("on {driver}"));
        if self.snapshot.is_selected == Some(false)
            && matches!(self.outcome, Outcome::NotPlaced | Outcome::Driver | Outcome::Owner)
        {
            return vec![
                "Add the namespace to namespaces.names, or label it as namespaces.selector says. Then new executors are \
                 placed."
                    .into(),
            ];
        }
        match self.outcome {
            Outcome::OtherRole => vec![format!(
                "Nothing, unless it is meant as an executor: set the label {} to {:?}.",
                self.conventions().workload_role_label,
                self.conventions().executor_role_value
            )],
            Outcome::NoJobId => {
                vec![format!("A label {} with the job's id, from the start.", self.conventions().job_id_label.join(" or "))]
            }
            Outcome::Owner => vec![format!("The annotation {annotation} of this pod, from the start: an edit applies to new sessions.")],
            Outcome::Driver => vec![format!("The annotation {annotation} of this pod; new executors follow an edit at once.")],
            Outcome::OptedOut => vec![format!("A ratio instead of off ({annotation}). It applies to new executors.")],
            Outcome::Fixed => vec![
                "No capacity in the nodeSelector or affinity of the executor's template. New executors then follow the ratio.".into(),
            ],
            Outcome::NotPlaced => vec![
                "Nothing: only new executors are placed, and only if the webhook answers.".into(),
            ],
            Outcome::Placed | Outcome::NotRecorded => self.placed_changes(annotation, &on_driver),
        }
    }

    fn placed_changes(&self, annotation: &str, on_driver: &str) -> Vec<String> {
        let mut words = Vec::new();
        let is_live = self.core.is_live();
        if is_live && self.node().is_none() {
            words.extend(self.waiting_changes(on_driver));
        }
        if let SpotState::Closed(_) = self.spot_state() {
            let retry =
                self.policy.fields.spot_retry_seconds.map(|seconds| format!("every {seconds} s ")).unwrap_or_default();
            words.push(format!(
                "Spot opens by itself: {retry}one executor tries spot, and if it finds a node, the ratio applies again."
            ));
        }
        let edited = match self.policy.source {
            RatioSource::Owner => "sessions",
            _ => "executors",
        };
        let runs = is_live && self.node().is_some() && self.phase() == "Running";
        let stays = if runs { " This executor stays as it is until it ends." } else { "" };
        words.push(format!("Another ratio ({annotation} {on_driver}) applies to new {edited}.{stays}"));
        words
    }

    /// What helps an executor that waits for a node.
    fn waiting_changes(&self, on_driver: &str) -> Vec<String> {
        let annotation = self.conventions().annotation(PolicyField::SpotFallbackSeconds);
        let is_best_effort = self.conventions().spot_preference == SpotPreference::BestEffort
            && self.snapshot.settings.known_defaults().is_some();
        let node = match (self.capacity, self.policy.fields.spot_fallback_seconds) {
            (Some(Capacity::Spot), _) if is_best_effort => {
                Some("It may run on spot and on on-demand, so a node of either that has room for it helps.".to_owned())
            }
            (Some(Capacity::Spot), Some(0)) => Some(format!(
                "It waits for spot for any time. With {annotation} {on_driver} executors that find no spot are replaced on on-demand."
            )),
            (Some(Capacity::Spot), Some(seconds)) => {
                Some(format!("If it finds no spot for {seconds} s, it is replaced on on-demand."))
            }
            (Some(Capacity::OnDemand), _) => {
                Some("It must run on on-demand, so an on-demand node that has room for it helps.".to_owned())
            }
            (_, _) => None,
        };
        let again = self
            .driver
            .is_some()
            .then(|| "If it is deleted, its driver may request another executor, which is placed anew.".to_owned());
        node.into_iter().chain(again).collect()
    }
}
