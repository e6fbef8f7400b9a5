//! Line and bar charts as SVG.

use std::path::Path;

use anyhow::{Result, anyhow};
use plotters::prelude::*;

use crate::files;
use crate::log::Record;

/// A line of a chart.
#[derive(Debug, Clone)]
pub struct Line {
    /// Its name in the legend.
    pub name: String,
    /// Its points.
    pub points: Vec<(f64, f64)>,
    /// Thin and pale, for what is noisy.
    pub faint: bool,
}

const SIZE: (u32, u32) = (900, 540);

/// Draws lines over a common axis and writes the file.
///
/// # Errors
/// Nothing to draw, or a file that cannot be written.
pub fn write(path: &Path, title: &str, (x_name, y_name): (&str, &str), lines: &[Line]) -> Result<()> {
    let svg = draw(title, (x_name, y_name), lines).map_err(|error| anyhow!("{}: {error}", path.display()))?;
    files::write(path, svg.as_bytes())
}

fn draw(title: &str, (x_name, y_name): (&str, &str), lines: &[Line]) -> Result<String> {
    let finite = |&(x, y): &(f64, f64)| x.is_finite() && y.is_finite();
    let points = || lines.iter().flat_map(|line| &line.points).copied().filter(|p| finite(p));
    let bounds = |of: fn((f64, f64)) -> f64| {
        points().map(of).fold((f64::INFINITY, f64::NEG_INFINITY), |(lo, hi), v| (lo.min(v), hi.max(v)))
    };
    let ((left, right), (low, high)) = (bounds(|p| p.0), bounds(|p| p.1));
    if left > right {
        return Err(anyhow!("nothing to draw"));
    }
    let margin = ((high - low) * 0.05).max(1e-3);
    let failed = |error: &dyn std::fmt::Display| anyhow!("{error}");
    let mut svg = String::new();
    {
        let area = SVGBackend::with_string(&mut svg, SIZE).into_drawing_area();
        area.fill(&WHITE).map_err(|e| failed(&e))?;
        let mut chart = ChartBuilder::on(&area)
            .caption(title, ("sans-serif", 18))
            .margin(12)
            .x_label_area_size(42)
            .y_label_area_size(56)
            .build_cartesian_2d(left..right.max(left + 1.0), low - margin..high + margin)
            .map_err(|e| failed(&e))?;
        chart.configure_mesh().x_desc(x_name).y_desc(y_name).draw().map_err(|e| failed(&e))?;
        for (i, line) in lines.iter().enumerate() {
            let color = Palette99::pick(i).to_rgba();
            let style = if line.faint { color.mix(0.35).stroke_width(1) } else { color.stroke_width(2) };
            chart
                .draw_series(LineSeries::new(line.points.iter().copied().filter(|p| finite(p)), style))
                .map_err(|e| failed(&e))?
                .label(line.name.clone())
                .legend(move |(x, y)| PathElement::new([(x, y), (x + 18, y)], style));
        }
        chart
            .configure_series_labels()
            .background_style(WHITE.mix(0.85))
            .border_style(BLACK.mix(0.3))
            .draw()
            .map_err(|e| failed(&e))?;
        area.present().map_err(|e| failed(&e))?;
    }
    Ok(svg)
}

/// A bar of a chart, from 0 up.
#[derive(Debug, Clone, Copy)]
pub struct Bar {
    /// Where it begins on the x axis.
    pub left: f64,
    /// Where it ends.
    pub right: f64,
    /// Its height.
    pub height: f64,
}

/// Draws bars and writes the file; `label` names a place on the x axis.
///
/// # Errors
/// Nothing to draw, or a file that cannot be written.
pub fn write_bars(
    path: &Path,
    title: &str,
    names: (&str, &str),
    bars: &[Bar],
    label: impl Fn(f64) -> String,
) -> Result<()> {
    let svg = draw_bars(title, names, bars, label).map_err(|error| anyhow!("{}: {error}", path.display()))?;
    files::write(path, svg.as_bytes())
}

fn draw_bars(
    title: &str,
    (x_name, y_name): (&str, &str),
    bars: &[Bar],
    label: impl Fn(f64) -> String,
) -> Result<String> {
    let left = bars.iter().map(|bar| bar.left).fold(f64::INFINITY, f64::min);
    let right = bars.iter().map(|bar| bar.right).fold(f64::NEG_INFINITY, f64::max);
    let high = bars.iter().map(|bar| bar.height).fold(0.0, f64::max);
    if !(left < right && high.is_finite()) {
        return Err(anyhow!("nothing to draw"));
    }
    let failed = |error: &dyn std::fmt::Display| anyhow!("{error}");
    let mut svg = String::new();
    {
        let area = SVGBackend::with_string(&mut svg, SIZE).into_drawing_area();
        area.fill(&WHITE).map_err(|e| failed(&e))?;
        let mut chart = ChartBuilder::on(&area)
            .caption(title, ("sans-serif", 18))
            .margin(12)
            .x_label_area_size(42)
            .y_label_area_size(56)
            .build_cartesian_2d(left..right, 0.0..high.max(1.0) * 1.05)
            .map_err(|e| failed(&e))?;
        chart
            .configure_mesh()
            .disable_x_mesh()
            .x_labels(bars.len() + 1)
            .x_label_formatter(&|x| label(*x))
            .x_desc(x_name)
            .y_desc(y_name)
            .draw()
            .map_err(|e| failed(&e))?;
        let style = Palette99::pick(0).filled();
        let gap = 0.04 * (right - left) / bars.len() as f64;
        chart
            .draw_series(
                bars.iter()
                    .filter(|bar| bar.height > 0.0)
                    .map(|bar| Rectangle::new([(bar.left + gap, 0.0), (bar.right - gap, bar.height)], style)),
            )
            .map_err(|e| failed(&e))?;
        area.present().map_err(|e| failed(&e))?;
    }
    Ok(svg)
}

/// The loss of a run: every step, its moving average, held-out loss, and the two lines to compare it with.
pub fn loss_lines(records: &[Record], unigram_entropy: f64, floor: Option<f64>) -> Vec<Line> {
    let xs = || records.iter().map(|r| r.step as f64);
    let mut average = None;
    let smooth = records
        .iter()
        .map(|r| {
            let value = average.map_or(r.loss, |a: f64| 0.95 * a + 0.05 * r.loss);
            average = Some(value);
            (r.step as f64, value)
        })
        .collect();
    let evaluated = records.iter().filter_map(|r| r.eval_loss.map(|loss| (r.step as f64, loss)));
    let (first, last) = (xs().next().unwrap_or(0.0), xs().next_back().unwrap_or(1.0));
    let flat =
        |name: &str, y: f64| Line { name: name.into(), points: vec![(first, y), (last, y)], faint: false };
    let mut lines = vec![
        Line {
            name: "loss".into(),
            points: records.iter().map(|r| (r.step as f64, r.loss)).collect(),
            faint: true,
        },
        Line { name: "loss, moving average".into(), points: smooth, faint: false },
        Line { name: "held-out loss".into(), points: evaluated.collect(), faint: false },
        flat("unigram entropy", unigram_entropy),
    ];
    if let Some(floor) = floor {
        lines.push(flat("floor", floor));
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn charts_are_svg_and_leave_out_what_is_not_finite() {
        let points = vec![(1.0, 2.0), (2.0, f64::NAN), (3.0, 1.0)];
        let line = Line { name: "a < b".into(), points, faint: false };
        let svg = draw("t", ("x", "y"), &[line]).unwrap();
        assert!(svg.starts_with("<svg") && svg.contains("a &lt; b") && !svg.contains("NaN"));
        assert!(draw("t", ("x", "y"), &[]).is_err());
    }

    #[test]
    fn bars_have_the_labels_of_their_places() {
        let bars = [2.0, 5.0].map(|left| Bar { left, right: left + 1.0, height: left });
        let svg = draw_bars("a < b", ("x", "y"), &bars, |x| format!("at {x}")).unwrap();
        assert!(svg.contains("a &lt; b") && svg.contains("at 4"), "{svg}");
        assert_eq!(svg.matches("<rect").count(), 1 + bars.len());
        assert!(draw_bars("t", ("x", "y"), &[], |x| x.to_string()).is_err());
    }
}
