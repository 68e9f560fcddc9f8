//! The report: one HTML file with tables and plots that needs nothing else, no network and no script.

use askama::Template;
use plotters::coord::Shift;
use plotters::prelude::*;

use super::run::Forecast;
use super::{COLUMNS, Simulation, notes};

/// The size of a plot. On a phone it shrinks by a seventh, so its text stays readable.
const SIZE: (u32, u32) = (420, 320);
/// plotters shrinks it by a quarter.
const FONT: (&str, i32) = ("sans-serif", 17);
/// One colour for each base; they are told apart with any kind of colour blindness (Okabe and Ito).
const COLOURS: [RGBColor; 6] = [
    RGBColor(0, 114, 178),
    RGBColor(213, 94, 0),
    RGBColor(0, 158, 115),
    RGBColor(204, 121, 167),
    RGBColor(230, 159, 0),
    RGBColor(86, 180, 233),
];

/// Why the report cannot be rendered.
#[derive(Debug, thiserror::Error)]
pub(super) enum ReportError {
    #[error("cannot draw the plot {plot:?}: {cause}")]
    Plot { plot: &'static str, cause: String },
    #[error("cannot render the report: {0}")]
    Template(#[from] askama::Error),
}

#[derive(Template)]
#[template(path = "simulation.html")]
struct Report<'a> {
    simulation: &'a Simulation,
    header: Vec<&'static str>,
    rows: Vec<Vec<String>>,
    notes: Vec<String>,
    bases: Vec<(String, u32)>,
    cost_and_risk: String,
    time_by_ratio: String,
}

/// The report as HTML, which is well-formed XML too.
pub(super) fn render(simulation: &Simulation) -> Result<String, ReportError> {
    let mut header: Vec<_> = COLUMNS.iter().map(|column| column.name).collect();
    header.extend(simulation.on_demand_cost.map(|_| "PRICE"));
    let rows = simulation.forecasts.iter().map(|forecast| {
        let price = simulation.on_demand_cost.map(|cost| format!("{:.2}", cost * forecast.cost.value));
        COLUMNS.iter().map(|column| (column.of)(forecast)).chain(price).collect()
    });
    let colour = |RGBColor(red, green, blue): RGBColor| format!("#{red:02x}{green:02x}{blue:02x}");
    let series = series(&simulation.forecasts);
    let report = Report {
        simulation,
        header,
        rows: rows.collect(),
        notes: notes(simulation),
        bases: series.iter().map(|series| (colour(series.colour), series.base)).collect(),
        cost_and_risk: plot("cost and risk", |area| cost_and_risk(area, &series))?,
        time_by_ratio: plot("run time by ratio", |area| time_by_ratio(area, &series))?,
    };
    Ok(report.render()?)
}

/// The forecasts with one base.
struct Series<'a> {
    base: u32,
    colour: RGBColor,
    forecasts: Vec<&'a Forecast>,
}

fn series(forecasts: &[Forecast]) -> Vec<Series<'_>> {
    let mut all = Vec::<Series<'_>>::new();
    let mut colours = COLOURS.into_iter().cycle();
    for forecast in forecasts {
        if let Some(series) = all.iter_mut().find(|series| series.base == forecast.base) {
            series.forecasts.push(forecast);
        } else if let Some(colour) = colours.next() {
            all.push(Series { base: forecast.base, colour, forecasts: vec![forecast] });
        }
    }
    for series in &mut all {
        series.forecasts.sort_by(|one, other| ratio(one).total_cmp(&ratio(other)));
    }
    all
}

fn ratio(forecast: &Forecast) -> f64 {
    forecast.ratio.parse().unwrap_or_default()
}

type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;
type Drawn = Result<(), Box<dyn std::error::Error>>;

fn plot(name: &'static str, draw: impl FnOnce(&Area<'_>) -> Drawn) -> Result<String, ReportError> {
    let mut svg = String::new();
    let drawn = {
        let area = SVGBackend::with_string(&mut svg, SIZE).into_drawing_area();
        draw(&area).and_then(|()| Ok(area.present()?))
    };
    drawn.map_err(|error| ReportError::Plot { plot: name, cause: error.to_string() })?;
    // Within HTML an SVG needs no namespace, and what names no address loads nothing.
    let labelled = format!("<svg role=\"img\" aria-label=\"{name}\"");
    Ok(svg.replacen("<svg", &labelled, 1).replacen(" xmlns=\"http://www.w3.org/2000/svg\"", "", 1))
}

/// Bounds a little beyond all values.
fn bounds(values: impl Iterator<Item = f64>, at_least: f64) -> std::ops::Range<f64> {
    let (low, high) =
        values.fold((f64::INFINITY, f64::NEG_INFINITY), |(low, high), value| (low.min(value), high.max(value)));
    let room = ((high - low) * 0.1).max(at_least);
    (low - room).max(0.0)..high + room
}

fn cost_and_risk(area: &Area<'_>, all: &[Series<'_>]) -> Drawn {
    let forecasts = || all.iter().flat_map(|series| &series.forecasts);
    let costs = bounds(forecasts().map(|forecast| forecast.cost.value * 100.0), 1.0);
    let risks = bounds(forecasts().flat_map(|forecast| [0.0, forecast.risk.high * 100.0]), 1e-4);
    let mut chart = ChartBuilder::on(area)
        .margin(8)
        .x_label_area_size(40)
        .y_label_area_size(80)
        .build_cartesian_2d(costs, 0.0..risks.end * 1.15)?;
    chart
        .configure_mesh()
        .disable_mesh()
        .label_style(FONT)
        .x_desc("cost, % of on-demand")
        .y_desc("third lost at once, % of jobs")
        .x_labels(6)
        .y_labels(6)
        .x_label_formatter(&|cost| format!("{cost:.0}"))
        .y_label_formatter(&|risk| axis(*risk, risks.end))
        .draw()?;
    for (row, Series { colour, forecasts, .. }) in (1..).zip(all) {
        let point = |forecast: &Forecast| (forecast.cost.value * 100.0, forecast.risk.value * 100.0);
        chart.draw_series(LineSeries::new(forecasts.iter().map(|forecast| point(forecast)), colour))?;
        for forecast in forecasts {
            let (cost, risk) = point(forecast);
            let error = [(cost, forecast.risk.low * 100.0), (cost, forecast.risk.high * 100.0)];
            chart.draw_series([PathElement::new(error, colour)])?;
            chart.draw_series([Circle::new((cost, risk), 4, colour.filled())])?;
            // In a row for each base, so that labels of points with the same risk do not cover each other.
            let label = EmptyElement::at((cost, risk)) + Text::new(forecast.ratio.clone(), (-6, -16 * row - 4), FONT);
            chart.draw_series([label])?;
        }
    }
    Ok(())
}

fn time_by_ratio(area: &Area<'_>, all: &[Series<'_>]) -> Drawn {
    let forecasts = || all.iter().flat_map(|series| &series.forecasts);
    let worst =
        |forecast: &Forecast| forecast.largest_pool.as_ref().map_or(forecast.hours.mean.value, |pool| pool.hours);
    let times = forecasts().flat_map(|forecast| [forecast.hours.mean.low, forecast.hours.p999, worst(forecast)]);
    let times = bounds(times, 0.01);
    let end = times.end;
    let mut chart = ChartBuilder::on(area)
        .margin(8)
        .x_label_area_size(40)
        .y_label_area_size(80)
        .build_cartesian_2d(0.0..1.05, times)?;
    chart
        .configure_mesh()
        .disable_mesh()
        .label_style(FONT)
        .x_desc("spot ratio")
        .y_desc("run time, h")
        .x_labels(6)
        .y_labels(6)
        .x_label_formatter(&|ratio| format!("{ratio:.1}"))
        .y_label_formatter(&|time| axis(*time, end))
        .draw()?;
    for Series { colour, forecasts, .. } in all {
        let line = |of: fn(&Forecast) -> f64| forecasts.iter().map(move |forecast| (ratio(forecast), of(forecast)));
        chart.draw_series(LineSeries::new(line(|forecast| forecast.hours.mean.value), colour.stroke_width(2)))?;
        chart.draw_series(LineSeries::new(
            forecasts.iter().map(|forecast| (ratio(forecast), worst(forecast))),
            colour,
        ))?;
        for forecast in forecasts {
            let (at, mean) = (ratio(forecast), forecast.hours.mean);
            chart.draw_series([PathElement::new([(at, mean.low), (at, mean.high)], colour)])?;
            chart.draw_series([Circle::new((at, mean.value), 4, colour.filled())])?;
            chart.draw_series([TriangleMarker::new((at, worst(forecast)), 5, colour.filled())])?;
        }
    }
    Ok(())
}

/// A number of an axis that ends there.
fn axis(value: f64, end: f64) -> String {
    let decimals = match end {
        tiny if tiny < 0.01 => 4,
        small if small < 1.0 => 3,
        medium if medium < 10.0 => 2,
        _ => 0,
    };
    format!("{value:.decimals$}")
}
