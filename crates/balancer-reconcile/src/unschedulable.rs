//! The executors that wait for a node and cannot get one because of what Spot Balancer requires of it, or because of
//! what else they require. Pure: the clock is the caller's. How long an executor waits is counted from when it was first
//! seen to, so the clocks of other machines do not matter.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use balancer_runtime::text::number_of;
use tokio::time::Instant;

use crate::index::DriverRef;

/// An executor that waits for less is no reason to worry anybody: a new node takes about so long.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);
/// Executors of one driver, or of all unknown ones, that are tracked. Further ones are not counted. So a driver that asks
/// for any number of executors does not hide those of others.
const MAX_OF_DRIVER: usize = 500;
/// How much of each list of requirements, and of the scheduler's message, is kept, in characters.
const MAX_TEXT: usize = 240;

/// Why an executor waits.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Reason {
    /// The executor's uid.
    uid: Box<str>,
    /// The pod that drives the executor's job, if it is known.
    driver: Option<DriverRef>,
    text: Text,
}

/// The words for it.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Text {
    /// What Spot Balancer requires of the node.
    ours: String,
    /// What the pod requires by itself.
    own: String,
    /// What the scheduler says.
    message: String,
}

impl Reason {
    /// `ours` and `own` are the requirements of Spot Balancer and of the pod.
    pub(crate) fn new(
        uid: &str,
        driver: Option<DriverRef>,
        (ours, own): (&[String], &[String]),
        message: &str,
    ) -> Self {
        let text = Text {
            ours: shorten(&ours.join(", ")),
            own: shorten(&own.join(", ")),
            // The scheduler repeats itself after this, about preemption.
            message: shorten(message.split(" preemption: ").next().unwrap_or(message)),
        };
        Self { uid: uid.into(), driver, text }
    }
}

fn shorten(text: &str) -> String {
    match text.char_indices().nth(MAX_TEXT) {
        Some((end, _)) => format!("{}…", text.get(..end).unwrap_or_default()),
        None => text.to_owned(),
    }
}

/// A driver whose executors have waited for too long.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Report {
    pub(crate) driver: DriverRef,
    /// The executor that waits longest.
    pub(crate) executor: String,
    /// How many of the driver's executors have waited for too long when the first of them has. Others may follow.
    pub(crate) executors: usize,
    text: Arc<Text>,
}

impl Report {
    /// What tells this report from an earlier one about the driver: executors that require something else.
    pub(crate) fn about(&self) -> String {
        let Text { ours, own, .. } = &*self.text;
        format!("{ours}; {own}")
    }

    /// For the people who read the Event. That a node is still on its way, or that there is no capacity, leads here, too.
    pub(crate) fn note(&self) -> String {
        let Self { executor, executors, text, .. } = self;
        let Text { ours, own, message } = &**text;
        let own = if own.is_empty() { "nothing else" } else { own };
        let (among, have) = if *executors == 1 { ("", "has") } else { (" among them", "have") };
        let which = format!("At least {}, {executor}{among}, {have}", number_of(*executors, "executor"));
        format!(
            "{which} found no node for more than {} s. Spot Balancer requires {ours} of the node, and the pod itself \
             requires {own}. The scheduler: {message}",
            PATIENCE.as_secs()
        )
    }
}

/// The executors that wait, by namespace and name.
#[derive(Debug, Default)]
pub(crate) struct Unschedulable {
    waiting: HashMap<String, HashMap<String, Waiting>>,
    /// How many of them have no known driver.
    of_unknown: usize,
    drivers: HashMap<Arc<DriverRef>, Driver>,
}

#[derive(Debug)]
struct Waiting {
    uid: Box<str>,
    since: Instant,
    driver: Option<Arc<DriverRef>>,
    /// Shared by executors that wait for the same reason.
    text: Arc<Text>,
}

/// A driver with executors that wait.
#[derive(Debug)]
struct Driver {
    executors: usize,
    last_text: Arc<Text>,
    is_reported: bool,
}

impl Unschedulable {
    /// An executor, or another pod, was reported. `reason` says why it waits; `None` if it does not.
    pub(crate) fn apply(&mut self, namespace: &str, name: &str, reason: Option<Reason>, now: Instant) {
        let Some(Reason { uid, driver, text }) = reason else { return self.delete(namespace, name) };
        let is_known = self.waiting.get(namespace).is_some_and(|waiting| waiting.contains_key(name));
        let of_driver = driver.as_ref().map_or(self.of_unknown, |driver| self.executors_of(driver));
        if !is_known && of_driver >= MAX_OF_DRIVER {
            return;
        }
        let (driver, text) = match driver {
            Some(driver) => {
                let (driver, text) = self.add(driver, text);
                (Some(driver), text)
            }
            None => {
                self.of_unknown += 1;
                (None, Arc::new(text))
            }
        };
        // Another pod of the same name has not waited yet.
        let known = self.remove(namespace, name).filter(|known| known.uid == uid);
        let since = known.map_or(now, |known| known.since);
        let waiting = self.waiting.entry(namespace.to_owned()).or_default();
        waiting.insert(name.to_owned(), Waiting { uid, since, driver, text });
    }

    /// A pod is gone, or waits no longer.
    pub(crate) fn delete(&mut self, namespace: &str, name: &str) {
        drop(self.remove(namespace, name));
    }

    /// Removes the executors that do not exist.
    pub(crate) fn retain(&mut self, exists: impl Fn(&str, &str) -> bool) {
        let all =
            self.waiting.iter().flat_map(|(namespace, waiting)| waiting.keys().map(move |name| (namespace, name)));
        let gone = all.filter(|(namespace, name)| !exists(namespace, name));
        for (namespace, name) in gone.map(|(namespace, name)| (namespace.clone(), name.clone())).collect::<Vec<_>>() {
            self.delete(&namespace, &name);
        }
    }

    /// Counts one more executor of the driver that waits. Returns the shared copies.
    fn add(&mut self, driver: DriverRef, text: Text) -> (Arc<DriverRef>, Arc<Text>) {
        let known = self.drivers.get_key_value(&driver).map(|(known, _)| Arc::clone(known));
        let reference = known.unwrap_or_else(|| Arc::new(driver));
        let driver = self.drivers.entry(Arc::clone(&reference));
        let driver =
            driver.or_insert_with(|| Driver { executors: 0, last_text: Arc::new(text.clone()), is_reported: false });
        driver.executors += 1;
        if *driver.last_text != text {
            driver.last_text = Arc::new(text);
        }
        (reference, Arc::clone(&driver.last_text))
    }

    fn executors_of(&self, driver: &DriverRef) -> usize {
        self.drivers.get(driver).map(|driver| driver.executors).unwrap_or_default()
    }

    fn remove(&mut self, namespace: &str, name: &str) -> Option<Waiting> {
        let waiting = self.waiting.get_mut(namespace)?;
        let removed = waiting.remove(name)?;
        if waiting.is_empty() {
            self.waiting.remove(namespace);
        }
        let Some(reference) = &removed.driver else {
            self.of_unknown -= 1;
            return Some(removed);
        };
        if let Some(driver) = self.drivers.get_mut(reference) {
            driver.executors -= 1;
            if driver.executors == 0 {
                self.drivers.remove(reference);
            }
        }
        Some(removed)
    }

    /// How many executors have waited for too long, in the namespaces that are in sync.
    pub(crate) fn overdue(&self, now: Instant, is_synced: impl Fn(&str) -> bool) -> usize {
        let synced = self.waiting.iter().filter(|(namespace, _)| is_synced(namespace));
        synced.flat_map(|(_, waiting)| waiting.values()).filter(|waiting| waiting.is_overdue(now)).count()
    }

    /// The drivers that have executors that have waited for too long, each once until none of its executors waits.
    /// Drivers in namespaces that are not in sync, and those beyond `most`, are reported later.
    pub(crate) fn take_reports(&mut self, now: Instant, most: usize, is_synced: impl Fn(&str) -> bool) -> Vec<Report> {
        let mut reports = HashMap::<&Arc<DriverRef>, (Instant, Report)>::new();
        let is_reported = |driver: &&Arc<DriverRef>| self.drivers.get(*driver).is_none_or(|driver| driver.is_reported);
        for (_, waiting) in self.waiting.iter().filter(|(namespace, _)| is_synced(namespace)) {
            for (name, executor) in waiting.iter().filter(|(_, executor)| executor.is_overdue(now)) {
                let Some(driver) = executor.driver.as_ref().filter(|driver| !is_reported(driver)) else { continue };
                let (since, report) = reports.entry(driver).or_insert_with(|| {
                    let (driver, text) = ((**driver).clone(), Arc::clone(&executor.text));
                    (executor.since, Report { driver, executor: name.clone(), executors: 0, text })
                });
                report.executors += 1;
                if (executor.since, name) < (*since, &report.executor) {
                    *since = executor.since;
                    (report.executor, report.text) = (name.clone(), Arc::clone(&executor.text));
                }
            }
        }
        let reports: Vec<Report> = reports.into_values().map(|(_, report)| report).take(most).collect();
        for report in &reports {
            if let Some(driver) = self.drivers.get_mut(&report.driver) {
                driver.is_reported = true;
            }
        }
        reports
    }
}

impl Waiting {
    fn is_overdue(&self, now: Instant) -> bool {
        now.duration_since(self.since) >= PATIENCE
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn driver(name: &str) -> DriverRef {
        DriverRef { namespace: "etl".into(), name: name.into(), uid: format!("uid of {name}") }
    }

    fn waits(of: &str, uid: &str) -> Option<Reason> {
        let (ours, own) = (["capacity=spot".to_owned()], ["pool=a".to_owned(), "zone in (b, c)".to_owned()]);
        let message =
            "0/3 nodes are available: 3 did not match. preemption: 0/3 nodes are available: 3 are not helpful";
        Some(Reason::new(uid, Some(driver(of)), (&ours, &own), message))
    }

    fn reported(tracker: &mut Unschedulable, now: Instant) -> Vec<String> {
        let mut drivers: Vec<_> =
            tracker.take_reports(now, usize::MAX, |_| true).into_iter().map(|report| report.driver.name).collect();
        drivers.sort_unstable();
        drivers
    }

    #[test]
    fn a_driver_is_reported_once_when_an_executor_has_waited_for_a_minute() {
        let (mut tracker, start) = (Unschedulable::default(), Instant::now());
        let at = |seconds| start + Duration::from_secs(seconds);
        for (name, of, seconds) in [("a-1", "a", 0), ("a-2", "a", 1), ("b-1", "b", 30)] {
            tracker.apply("etl", name, waits(of, name), at(seconds));
            // The scheduler tries again and again.
            tracker.apply("etl", name, waits(of, name), at(seconds + 20));
        }
        assert_eq!((tracker.overdue(at(59), |_| true), reported(&mut tracker, at(59))), (0, vec![]));
        assert_eq!((tracker.overdue(at(60), |_| true), reported(&mut tracker, at(60))), (1, vec!["a".into()]));
        assert_eq!((tracker.overdue(at(89), |_| true), reported(&mut tracker, at(89))), (2, vec![]));
        assert_eq!((tracker.overdue(at(90), |_| true), reported(&mut tracker, at(90))), (3, vec!["b".into()]));
        // Once none of its executors waits, the driver is reported again.
        tracker.apply("etl", "a-1", None, at(91));
        tracker.delete("etl", "a-2");
        assert_eq!((tracker.overdue(at(91), |_| true), reported(&mut tracker, at(91))), (1, vec![]));
        tracker.apply("etl", "a-3", waits("a", "a-3"), at(100));
        assert_eq!(reported(&mut tracker, at(160)), ["a"]);
    }

    #[test]
    fn the_note_names_both_requirements_and_what_the_scheduler_says() {
        let (mut tracker, start) = (Unschedulable::default(), Instant::now());
        tracker.apply("etl", "a-2", waits("a", "2"), start);
        tracker.apply("etl", "a-1", waits("a", "1"), start);
        let reports = tracker.take_reports(start + PATIENCE, usize::MAX, |_| true);
        assert_eq!(
            reports.iter().map(Report::note).collect::<Vec<_>>(),
            ["At least 2 executors, a-1 among them, have found no node for more than 60 s. Spot Balancer requires \
              capacity=spot of the node, and the pod itself requires pool=a, zone in (b, c). The scheduler: 0/3 nodes are \
              available: 3 did not match."]
        );
        let other = |text: &str| Report {
            text: Arc::new(Reason::new("u", None, (&[], &[text.into()]), "").text),
            ..reports[0].clone()
        };
        assert_ne!(other("pool=a").about(), other("pool=b").about());
        let long = Reason::new("u", None, (&["é".repeat(4_000)], &["é".repeat(4_000)]), &"é".repeat(4_000));
        assert!(long.text.ours.chars().count() <= MAX_TEXT + 1 && long.text.message.chars().count() <= MAX_TEXT + 1);
    }

    #[test]
    fn another_pod_of_the_same_name_has_not_waited_yet() {
        let (mut tracker, start) = (Unschedulable::default(), Instant::now());
        tracker.apply("etl", "a-1", waits("a", "first"), start);
        tracker.apply("etl", "a-1", waits("a", "second"), start + PATIENCE);
        assert_eq!(tracker.overdue(start + PATIENCE, |_| true), 0);
        assert_eq!(tracker.overdue(start + 2 * PATIENCE, |_| true), 1);
    }

    #[test]
    fn nothing_is_reported_of_a_namespace_that_is_not_in_sync() {
        let (mut tracker, start) = (Unschedulable::default(), Instant::now());
        tracker.apply("etl", "a-1", waits("a", "1"), start);
        assert_eq!(tracker.take_reports(start + PATIENCE, usize::MAX, |namespace| namespace != "etl"), []);
        assert_eq!(tracker.take_reports(start + PATIENCE, 0, |_| true), [], "there is no room for a report");
        assert_eq!(tracker.overdue(start + PATIENCE, |namespace| namespace != "etl"), 0);
        assert_eq!(tracker.overdue(start + PATIENCE, |_| true), 1);
        assert_eq!(reported(&mut tracker, start + PATIENCE), ["a"]);
    }

    #[test]
    fn executors_without_a_known_driver_are_counted() {
        let (mut tracker, start) = (Unschedulable::default(), Instant::now());
        tracker.apply("etl", "x", Some(Reason::new("u", None, (&["capacity=spot".into()], &[]), "")), start);
        assert_eq!(
            (tracker.overdue(start + PATIENCE, |_| true), reported(&mut tracker, start + PATIENCE)),
            (1, vec![])
        );
    }

    #[test]
    fn the_number_of_tracked_executors_of_a_driver_is_bounded_and_gone_ones_make_room() {
        let (mut tracker, start) = (Unschedulable::default(), Instant::now());
        for id in 0..MAX_OF_DRIVER + 10 {
            tracker.apply("etl", &id.to_string(), waits("a", "u"), start);
        }
        for id in 0..MAX_OF_DRIVER + 10 {
            let unknown = Some(Reason::new("u", None, (&["capacity=spot".into()], &[]), ""));
            tracker.apply("ml", &id.to_string(), unknown, start);
        }
        tracker.apply("etl", "another", waits("b", "u"), start);
        assert_eq!(tracker.overdue(start + PATIENCE, |_| true), 2 * MAX_OF_DRIVER + 1);
        tracker.retain(|namespace, name| namespace == "etl" && name == "7");
        assert_eq!((tracker.overdue(start + PATIENCE, |_| true), tracker.of_unknown), (1, 0));
        tracker.delete("etl", "7");
        assert!(tracker.waiting.is_empty());
        assert_eq!(reported(&mut tracker, start + PATIENCE), Vec::<String>::new());
        assert!(tracker.drivers.is_empty());
    }
}
