//! The facts of all jobs at `/jobs`, and the page that shows them, in a real browser.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use balancer_reconcile::jobs::{
    InvalidAnnotationFacts, JobFacts, JobsPage, NodeShare, PoolShare, RatioSource, SpotFacts, channel,
};
use balancer_runtime::admin;
use balancer_runtime::tasks::Tasks;
use balancer_tests::browser::Browser;
use balancer_tests::endpoint::{self, Answer};
use balancer_tests::need;
use balancer_tests::pods::annotate;
use balancer_tests::reconciler::Reconciler;
use balancer_tests::scenario::{REPAIRED, Scenario};
use balancer_tests::wait::{SOON, until, until_true};
use k8s_openapi::jiff::Timestamp;
use tokio::net::TcpStream;
use tokio::task::JoinHandle;
use tokio::time::sleep;

const MANY: u64 = 2000;
/// The jobs that the page shows at once.
const LISTED: u64 = 100;
const ROWS: &str = "document.querySelectorAll('#jobs tbody tr').length";
const FIRST: &str = "document.querySelector('#jobs tbody tr th .line')?.textContent ?? ''";
const STATUS: &str = "document.querySelector('#status').textContent";
/// What has the focus: its id, or its text.
const FOCUS: &str = "document.activeElement.id || document.activeElement.textContent";

/// The real page of jobs, with facts that a test makes up.
struct Page {
    url: String,
    facts: Arc<Mutex<Vec<Arc<JobFacts>>>>,
    tasks: Vec<JoinHandle<()>>,
}

impl Page {
    async fn start(jobs: Vec<JobFacts>) -> Result<Self> {
        let (publisher, reader) = channel();
        let facts = Arc::new(Mutex::new(jobs.into_iter().map(Arc::new).collect::<Vec<_>>()));
        let published = Arc::clone(&facts);
        let publishing = tokio::spawn(async move {
            loop {
                let jobs = published.lock().unwrap_or_else(PoisonError::into_inner).clone();
                publisher.publish(jobs.into());
                sleep(Duration::from_millis(100)).await;
            }
        });
        let page = JobsPage::bind(0, reader).await?;
        let url = format!("{}/", endpoint::http(page.address().port()));
        let tasks = Tasks::register(&mut admin::registry("test"));
        let serving = tokio::spawn(async move { match page.keep_serving(tasks).await {} });
        Ok(Self { url, facts, tasks: vec![publishing, serving] })
    }

    fn change(&self, change: impl FnOnce(&mut Vec<Arc<JobFacts>>)) {
        change(&mut self.facts.lock().unwrap_or_else(PoisonError::into_inner));
    }
}

impl Drop for Page {
    fn drop(&mut self) {
        self.tasks.iter().for_each(JoinHandle::abort);
    }
}

/// One of many jobs, each in another state.
#[expect(
    clippy::cast_precision_loss,
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "small numbers"
)]
fn job(id: u64) -> JobFacts {
    let (executors, pending, base) = (6 + id * 7 % 54, id % 4, u64::from(id.is_multiple_of(6)) * 2);
    let ratio =
        [(1, 0.7), (2, 0.9), (3, 1.0)].iter().find(|(rest, _)| *rest == id % 4).map_or(0.5, |(_, ratio)| *ratio);
    let wanted = ratio * (executors + pending - base) as f64;
    // Every third job is off its ratio, in either direction.
    let off = if id.is_multiple_of(3) { (id % 23) as i64 - 11 } else { 0 };
    let pending_spot = pending / 2;
    let spot = (wanted as i64 + off).clamp(pending_spot as i64, executors as i64) as u64 - pending_spot;
    let on_demand = executors - spot;
    let has_ratio = !id.is_multiple_of(31);
    let distance = if has_ratio { ((spot + pending_spot) as f64 - wanted) as i64 } else { 0 };
    let share = |part: u64| part as f64 / executors as f64;
    let (on_node, in_pool) = (executors.div_ceil(4 + id % 5), spot.div_ceil(1 + id % 3));
    let time = || Some("2026-03-01T09:30:00Z".to_owned());
    JobFacts {
        namespace: format!("team-{}", id % 12),
        job_id: format!("spark-{id:032x}"),
        driver: (!id.is_multiple_of(9)).then(|| format!("nightly-report-{id}-driver")),
        wanted_ratio: has_ratio.then_some(ratio),
        on_demand_base: u32::try_from(base).unwrap_or_default(),
        source: if id.is_multiple_of(5) { RatioSource::Default } else { RatioSource::Driver },
        spot,
        on_demand,
        pending,
        pending_spot,
        unknown: 0,
        distance,
        risk: share(on_node.max(in_pool)),
        largest_node: Some(NodeShare {
            name: format!("ip-10-0-{}-{}.eu-central-1.compute.internal", id % 200, id % 250),
            executors: on_node,
            share: share(on_node),
        }),
        largest_pool: (spot > 0).then(|| PoolShare {
            instance_type: "m6i.4xlarge".into(),
            zone: "eu-central-1a".into(),
            executors: in_pool,
            share: share(in_pool),
        }),
        spot_state: match id % 40 {
            3 => SpotFacts::Closed { since: time(), retry_at: time() },
            4 => SpotFacts::Probing { since: time(), executor: format!("exec-{id}") },
            _ => SpotFacts::Open,
        },
        invalid_annotations: (id % 50 == 9)
            .then(|| InvalidAnnotationFacts {
                annotation: "workload/spot-ratio".into(),
                problem: "\"lots\" is not a ratio; accepted: 0 to 1, 70%".into(),
            })
            .into_iter()
            .collect(),
    }
}

/// Where the pictures stay.
fn picture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("jobs-page-{name}.png"))
}

async fn ensure_no_complaints(browser: &mut Browser) -> Result<()> {
    let complaints = browser.complaints().await?;
    ensure!(complaints.is_empty(), "{complaints:#?}");
    Ok(())
}

#[tokio::test]
async fn two_thousand_jobs_fit_windows_of_1440_and_390_pixels() -> Result<()> {
    need!(Chromium);
    let page = Page::start((0..MANY).map(job).collect()).await?;
    let mut browser = Browser::start().await?;
    browser.prefer("light").await?;
    browser.open(&page.url, 1440, 900).await?;
    browser.until(ROWS, LISTED).await?;
    browser.until("document.querySelector('[data-total=jobs]').textContent", "2,000").await?;
    browser.until("document.querySelector('#range').textContent", "1 to 100 of 2,000").await?;
    browser.until(STATUS, "Live").await?;
    let distances = "[...document.querySelectorAll('#jobs td:nth-child(2) .line:first-child')]
        .map(line => Number(line.textContent.replace(/[+−]/, '')))";
    let distances: Vec<u64> = serde_json::from_value(browser.value(distances).await?)?;
    ensure!(distances.first() > Some(&5) && distances.is_sorted_by(|one, next| one >= next), "{distances:?}");
    for (width, scheme) in [(1440, "light"), (1440, "dark"), (390, "light"), (390, "dark")] {
        browser.prefer(scheme).await?;
        browser.resize(width, 900).await?;
        browser.until("innerWidth", width).await?;
        let overflow = browser.value("document.documentElement.scrollWidth - innerWidth").await?;
        assert_eq!(overflow, 0, "at {width} pixels nothing has to be scrolled sideways");
        let bytes = browser.screenshot(&picture(&format!("{width}-{scheme}"))).await?;
        ensure!(bytes > 20_000, "the picture at {width} pixels has only {bytes} bytes");
    }
    let elsewhere: Vec<_> =
        browser.loaded().into_iter().filter(|url| !url.starts_with(&page.url) && !url.starts_with("data:")).collect();
    ensure!(elsewhere.is_empty(), "{elsewhere:?}");
    ensure_no_complaints(&mut browser).await
}

#[tokio::test]
async fn everything_can_be_done_with_the_keyboard_alone() -> Result<()> {
    need!(Chromium);
    let page = Page::start((0..MANY).map(job).collect()).await?;
    let mut browser = Browser::start().await?;
    browser.open(&page.url, 1440, 900).await?;
    browser.until(ROWS, LISTED).await?;
    for expected in ["Skip to the jobs", "filter", "sort", "pause", "next"] {
        browser.press("Tab").await?;
        assert_eq!(browser.value(FOCUS).await?, expected);
        let outline = browser.value("getComputedStyle(document.activeElement).outlineStyle").await?;
        assert_ne!(outline, "none", "the focus on {expected} is visible");
    }
    let first = browser.value(FIRST).await?;
    browser.press("Enter").await?;
    browser.until("document.querySelector('#range').textContent", "101 to 200 of 2,000").await?;
    browser.until(FOCUS, "jobs").await?;
    assert_ne!(browser.value(FIRST).await?, first);
    browser.press("Tab").await?;
    assert_eq!(browser.value(FOCUS).await?, "previous");
    browser.press("Enter").await?;
    browser.until(FIRST, first).await?;

    browser.value("document.querySelector('#filter').focus()").await?;
    browser.write("TEAM-3").await?;
    browser.until("document.querySelector('[data-total=jobs]').textContent", "167").await?;
    browser.press("Tab").await?;
    browser.press("ArrowDown").await?;
    browser.press("ArrowDown").await?;
    browser.until(FIRST, job(3).job_id).await?;
    browser.press("Tab").await?;
    browser.press("Space").await?;
    browser.until(STATUS, "Paused").await?;
    page.change(|jobs| jobs.clear());
    // Longer than from one request to the next.
    sleep(Duration::from_secs(3)).await;
    assert_eq!(browser.value(ROWS).await?, LISTED);
    browser.press("Enter").await?;
    browser.until(ROWS, 0).await?;
    ensure_no_complaints(&mut browser).await
}

#[tokio::test]
async fn a_change_is_shown_without_a_reload_and_names_are_never_markup() -> Result<()> {
    need!(Chromium);
    let hostile = "<img src=x onerror=alert(1)>";
    let mut first = JobFacts { namespace: hostile.into(), job_id: hostile.into(), distance: 5, ..job(1) };
    first.invalid_annotations = vec![InvalidAnnotationFacts { annotation: hostile.into(), problem: hostile.into() }];
    let page = Page::start(vec![first.clone(), job(1)]).await?;
    let mut browser = Browser::start().await?;
    browser.open(&page.url, 1440, 900).await?;
    browser.until(FIRST, hostile).await?;
    assert_eq!(browser.value("document.querySelectorAll('img, main script').length").await?, 0);
    browser.value("window.kept = document.querySelector('#jobs tbody tr')").await.ok();
    page.change(|jobs| jobs[0] = Arc::new(JobFacts { spot: 4321, ..first }));
    let label = "document.querySelector('#jobs [role=img]').ariaLabel.split(',').slice(0, 2).join()";
    browser.until(label, "4,321 spot").await?;
    assert_eq!(browser.value("kept === document.querySelector('#jobs tbody tr')").await?, true, "the row is the same");
    ensure_no_complaints(&mut browser).await
}

#[tokio::test]
async fn a_time_shows_its_date_unless_it_is_today() -> Result<()> {
    need!(Chromium);
    let page = Page::start(Vec::new()).await?;
    let mut browser = Browser::start().await?;
    browser.open(&page.url, 1440, 900).await?;
    // Midday, so that the day is the same for the browser and for the page.
    let text = browser.value("new Date(new Date().setHours(12, 0, 0, 0)).toISOString()").await?;
    let noon: Timestamp = text.as_str().context("no time")?.parse()?;
    let day_before = Timestamp::from_second(noon.as_second() - 86_400)?;
    let state = |since: Timestamp| SpotFacts::Probing { since: Some(since.to_string()), executor: "exec-1".into() };
    page.change(|jobs| {
        *jobs = vec![
            Arc::new(JobFacts { spot_state: state(noon), distance: 9, ..job(1) }),
            Arc::new(JobFacts { spot_state: state(day_before), distance: 8, ..job(2) }),
        ];
    });
    browser.until(ROWS, 2).await?;
    let shown = "[...document.querySelectorAll('#jobs .line.bad')].map(line => line.textContent)
        .filter(text => text.startsWith('probing')).join('|')";
    let expected = format!(
        "(at => `probing; closed since ${{at({}).toLocaleTimeString()}}|probing; closed since ${{at({}).toLocaleString()}}`)
        (second => new Date(second * 1000))",
        noon.as_second(),
        day_before.as_second()
    );
    let expected = browser.value(&expected).await?;
    browser.until(shown, expected).await
}

#[tokio::test]
async fn a_screen_reader_finds_a_table_with_named_bars_in_both_layouts() -> Result<()> {
    need!(Chromium);
    let page = Page::start((0..10).map(job).collect()).await?;
    let mut browser = Browser::start().await?;
    for width in [1440, 390] {
        browser.open(&page.url, width, 900).await?;
        browser.until(ROWS, 10).await?;
        let nodes = browser.accessible().await?;
        let of = |role: &str| nodes.iter().filter(|(of, _)| of == role).map(|(_, name)| name).collect::<Vec<_>>();
        assert_eq!((of("table").len(), of("row").len(), of("columnheader").len()), (1, 11, 6), "at {width} pixels");
        let bars = of("image");
        ensure!(
            bars.len() == 10 && bars.iter().all(|name| name.contains("spot") && name.contains("wanted")),
            "{bars:?}"
        );
        for role in ["searchbox", "combobox", "button"] {
            ensure!(!of(role).is_empty() && of(role).iter().all(|name| !name.is_empty()), "{role}: {:?}", of(role));
        }
    }
    ensure_no_complaints(&mut browser).await
}

#[tokio::test]
async fn a_page_that_lost_its_reconciler_says_so_and_keeps_what_it_has() -> Result<()> {
    need!(Chromium);
    let page = Page::start((0..10).map(job).collect()).await?;
    let mut browser = Browser::start().await?;
    browser.open(&page.url, 1440, 900).await?;
    browser.until(ROWS, 10).await?;
    drop(page);
    browser.until(&format!("{STATUS}.startsWith('The reconciler does not answer')"), true).await?;
    assert_eq!(browser.value(ROWS).await?, 10);
    Ok(())
}

async fn jobs(reconciler: &Reconciler, query: &str) -> Result<Answer> {
    let client = endpoint::client(&format!("http://localhost:{}", reconciler.page_port))?;
    endpoint::get(&client, &format!("/jobs{query}")).await
}

#[tokio::test]
async fn the_leader_shows_the_jobs_of_the_cluster_and_a_follower_names_the_leader() -> Result<()> {
    need!(Redis, ControlPlane, Scheduler, Webhook, Reconciler, Chromium);
    let scenario = Scenario::reconciled("page", 1, 2).await?;
    let counts = scenario.grow("etl", "0.7", 10).await?;
    scenario.until_bound("etl").await?;
    let leader = until(SOON, "one leader", async || scenario.leader().await).await?;
    let leading = &scenario.reconcilers[leader];
    let query = format!("?namespace={}", scenario.namespace);
    let facts = until(REPAIRED, "the facts of the job", async || {
        let answer = jobs(leading, &query).await?;
        ensure!(answer.status == 200, "{answer:?}");
        let facts = answer.json()?["jobs"][0].clone();
        Ok((facts["spot"] == counts.spot && facts["onDemand"] == counts.on_demand).then_some(facts))
    })
    .await?;
    assert_eq!((&facts["jobId"], &facts["driver"]), (&"etl".into(), &"etl-driver".into()));
    assert_eq!(
        (&facts["wantedRatio"], &facts["source"], &facts["distance"]),
        (&0.7.into(), &"driver".into(), &0.into())
    );
    assert_eq!((&facts["pending"], &facts["spotState"]["state"]), (&0.into(), &"open".into()));
    ensure!(facts["largestNode"]["executors"].as_u64() >= Some(1), "{facts}");

    annotate(&scenario.pods(), "etl-driver", "workload/spot-ratio", Some("lots")).await?;
    // The policy stays as it is, so nothing but the regular pass over all jobs notices.
    until_true(Duration::from_secs(15), "the invalid annotation to be shown", async || {
        let facts = jobs(leading, &query).await?.json()?["jobs"][0].clone();
        Ok(facts["source"] == "previous" && facts["invalidAnnotations"][0]["annotation"] == "workload/spot-ratio")
    })
    .await?;

    let follower = jobs(&scenario.reconcilers[1 - leader], "").await?;
    let holder = scenario.lease().await?.holder_identity.context("no leader")?;
    assert_eq!((follower.status, &follower.json()?["leader"]), (503, &holder.as_str().into()));

    let mut browser = Browser::start().await?;
    browser.open(&endpoint::http(leading.page_port), 1440, 900).await?;
    let row = "[...document.querySelectorAll('#jobs tbody tr')].map(row => row.querySelector('th').innerText)";
    browser.until(&format!("{row}.includes('etl\\n{}\\netl-driver')", scenario.namespace), true).await?;
    ensure_no_complaints(&mut browser).await?;
    browser.open(&endpoint::http(scenario.reconcilers[1 - leader].page_port), 1440, 900).await?;
    browser.until(STATUS, format!("this replica stands by; ask the leader, {holder}")).await?;
    Ok(())
}

/// On Linux each address that begins with 127 is this host's, and a port of all addresses answers on it.
#[tokio::test]
async fn the_page_is_not_reachable_by_another_address_than_the_loopback_one() -> Result<()> {
    need!(Redis, ControlPlane, Scheduler, Webhook, Reconciler);
    let scenario = Scenario::reconciled("loopback", 1, 1).await?;
    let reconciler = &scenario.reconcilers[0];
    TcpStream::connect(("127.0.0.2", reconciler.admin_port)).await.context("the admin port")?;
    TcpStream::connect(("127.0.0.1", reconciler.page_port)).await.context("the page")?;
    ensure!(TcpStream::connect(("127.0.0.2", reconciler.page_port)).await.is_err(), "the page answers elsewhere");
    let admin = endpoint::get(&reconciler.admin()?, "/jobs").await?;
    assert_eq!(admin.status, 404, "the port that is scraped does not have the facts");
    Ok(())
}
