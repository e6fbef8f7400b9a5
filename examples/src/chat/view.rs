//! Draws the state: a history, a panel of settings, the line that is written, and a line of what is going on.

use ratatui::Frame;
use ratatui::layout::{Constraint, Layout, Margin, Rect};
use ratatui::style::{Color, Modifier, Style};
use ratatui::text::{Line, Span, Text};
use ratatui::widgets::{
    Block, BorderType, Clear, Paragraph, Scrollbar, ScrollbarOrientation, ScrollbarState,
};

use super::app::{App, Focus};
use super::settings::Setting;
use super::transcript::Turn;
use super::{command, keys, wrap};
use crate::printable;

/// Columns of the panel of settings, and of a terminal that has room for it all the time.
const PANEL: u16 = 30;
const WIDE: u16 = 78;
/// The most rows of the line that is written.
const INPUT_ROWS: usize = 6;

const FAINT: Style = Style::new().fg(Color::DarkGray);
const USER: Style = Style::new().fg(Color::Cyan).add_modifier(Modifier::BOLD);
const MODEL: Style = Style::new().fg(Color::Green).add_modifier(Modifier::BOLD);
const WRONG: Style = Style::new().fg(Color::Red);

/// The drawing, with the rows of the turns that are not written any more.
#[derive(Debug, Default)]
pub struct View {
    turns: Vec<Rows>,
}

/// The rows of one turn, for one width and one state of it.
#[derive(Debug)]
struct Rows {
    width: usize,
    turn: Turn,
    lines: Vec<Line<'static>>,
}

impl View {
    /// Draws all of it.
    pub fn draw(&mut self, frame: &mut Frame<'_>, app: &mut App) {
        let area = frame.area();
        // One column is kept for the cursor behind the last letter.
        let input_width = usize::from(area.width.saturating_sub(3));
        let input_rows = wrap::graphemes(app.input.text(), input_width);
        let input_height = input_rows.len().min(INPUT_ROWS) as u16 + 2;
        let [body, input, status] =
            Layout::vertical([Constraint::Min(0), Constraint::Length(input_height), Constraint::Length(1)])
                .areas(area);
        let in_settings = matches!(app.focus, Focus::Settings { .. });
        let panel = if area.width >= WIDE || in_settings { PANEL } else { 0 };
        let [history, panel] =
            Layout::horizontal([Constraint::Min(0), Constraint::Length(panel)]).areas(body);
        self.history(frame, history, app);
        settings(frame, panel, app);
        write(frame, input, app, &input_rows);
        frame.render_widget(status_line(app), status);
        if app.focus == Focus::Help {
            help(frame, body);
        }
    }

    fn history(&mut self, frame: &mut Frame<'_>, area: Rect, app: &mut App) {
        let kind = if app.answers { "answers" } else { "continues text" };
        let block = bordered(false).title(format!(" {} ({kind}) ", printable(&app.model)));
        let inside = block.inner(area).inner(Margin::new(1, 0));
        frame.render_widget(block, area);
        let (width, height) = (usize::from(inside.width), usize::from(inside.height));
        if width == 0 || height == 0 {
            return;
        }
        let lines = self.lines(app, width);
        let most = lines.len().saturating_sub(height);
        app.page = height;
        app.scroll = app.scroll.min(most);
        let start = most - app.scroll;
        let shown: Vec<Line<'_>> = lines.iter().skip(start).take(height).map(|&line| line.clone()).collect();
        let total = lines.len();
        frame.render_widget(Text::from(shown), inside);
        if total > height {
            let mut state = ScrollbarState::new(most + 1).position(start).viewport_content_length(height);
            let bar = Scrollbar::new(ScrollbarOrientation::VerticalRight).begin_symbol(None).end_symbol(None);
            frame.render_stateful_widget(bar, area.inner(Margin::new(0, 1)), &mut state);
        }
    }

    /// All rows of the history. Only the turns that have changed are broken into rows again.
    fn lines(&mut self, app: &App, width: usize) -> Vec<&Line<'static>> {
        let turns = &app.transcript.turns;
        self.turns.truncate(turns.len());
        for (i, turn) in turns.iter().enumerate() {
            let same = |rows: &Rows| rows.width == width && rows.turn == *turn;
            if !self.turns.get(i).is_some_and(same) {
                let lines = if app.answers { exchange(turn, width) } else { continued(turn, width) };
                let rows = Rows { width, turn: turn.clone(), lines };
                match self.turns.get_mut(i) {
                    Some(old) => *old = rows,
                    None => self.turns.push(rows),
                }
            }
        }
        self.turns.iter().flat_map(|rows| &rows.lines).collect()
    }
}

/// A message and its answer, each under a heading.
fn exchange(turn: &Turn, width: usize) -> Vec<Line<'static>> {
    let mut lines = Vec::new();
    for (name, style, text) in
        [("You", USER, turn.question.as_str()), ("Model", MODEL, turn.answer.trim_end())]
    {
        lines.push(Line::styled(name, style));
        let text = clean(text);
        lines.extend(
            wrap::words(&text, width)
                .into_iter()
                .map(|row| Line::raw(text.get(row).unwrap_or_default().to_owned())),
        );
        lines.push(Line::default());
    }
    lines
}

/// The beginning of a text and, in the same rows, how the model went on.
fn continued(turn: &Turn, width: usize) -> Vec<Line<'static>> {
    let question = clean(&turn.question);
    let text = format!("{question}{}", clean(turn.answer.trim_end()));
    let given = question.len();
    let row = |row: std::ops::Range<usize>| {
        let middle = given.clamp(row.start, row.end);
        let part = |range: std::ops::Range<usize>| text.get(range).unwrap_or_default().to_owned();
        Line::from(vec![Span::styled(part(row.start..middle), USER), Span::raw(part(middle..row.end))])
    };
    let mut lines: Vec<Line<'_>> = wrap::words(&text, width).into_iter().map(row).collect();
    lines.push(Line::default());
    lines
}

/// Text without what a terminal would obey; a tab is four spaces.
fn clean(text: &str) -> String {
    printable(&text.replace("\r\n", "\n").replace('\t', "    "))
}

fn bordered(chosen: bool) -> Block<'static> {
    let style = if chosen { Style::new().fg(Color::Cyan) } else { FAINT };
    Block::bordered().border_type(BorderType::Rounded).border_style(style)
}

fn settings(frame: &mut Frame<'_>, area: Rect, app: &App) {
    let chosen = match &app.focus {
        Focus::Settings { at, edit } => Some((*at, edit.as_deref())),
        _ => None,
    };
    let block = bordered(chosen.is_some()).title(" Settings (F2) ");
    let inside = block.inner(area).inner(Margin::new(1, 0));
    let width = usize::from(inside.width);
    let mut lines: Vec<Line<'_>> = Vec::new();
    for (i, setting) in Setting::ALL.into_iter().enumerate() {
        let mut value = setting.show(&app.settings);
        let mut style = Style::new();
        if let Some((at, edit)) = chosen
            && at == i
        {
            style = style.add_modifier(Modifier::REVERSED);
            if let Some(edit) = edit {
                value = format!("{edit}_");
            }
        }
        let name = setting.name();
        // A value that is longer than its room shows its end.
        let room = width.saturating_sub(name.len() + 1);
        let value: String = value.chars().skip(value.len().saturating_sub(room)).collect();
        lines.push(Line::styled(format!("{name} {value:>room$}"), style));
    }
    lines.push(Line::default());
    let help = if chosen.is_some() {
        ["Up, Down, Left, Right", "or a number and Enter"]
    } else {
        ["of the next answer", ""]
    };
    lines.extend(help.map(|line| Line::styled(line, FAINT)));
    frame.render_widget(block, area);
    frame.render_widget(Text::from(lines), inside);
}

fn write(frame: &mut Frame<'_>, area: Rect, app: &App, rows: &[std::ops::Range<usize>]) {
    let title = if app.answers { " Message (Enter sends) " } else { " Beginning of a text (Enter sends) " };
    let block = bordered(app.focus == Focus::Input).title(title);
    let inside = block.inner(area);
    frame.render_widget(block, area);
    let height = usize::from(inside.height);
    if height == 0 || inside.width == 0 {
        return;
    }
    let text = app.input.text();
    let (row, column) = wrap::place(text, rows, app.input.cursor());
    let first = (row + 1).saturating_sub(height);
    let lines = rows.iter().skip(first).take(height);
    let lines: Vec<Line<'_>> =
        lines.map(|row| Line::raw(text.get(row.clone()).unwrap_or_default())).collect();
    frame.render_widget(Text::from(lines), inside);
    if app.focus == Focus::Input {
        let x = inside.x + (column as u16).min(inside.width - 1);
        frame.set_cursor_position((x, inside.y + (row - first) as u16));
    }
}

fn status_line(app: &App) -> Line<'static> {
    let mut spans = vec![Span::raw(" ")];
    let mut part = |text: String, style: Style| {
        if spans.len() > 1 {
            spans.push(Span::styled("  ·  ", FAINT));
        }
        spans.push(Span::styled(text, style));
    };
    if app.writing {
        part("writing, Esc stops".into(), MODEL);
    }
    if let Some(notice) = &app.notice {
        part(printable(&notice.text), if notice.wrong { WRONG } else { Style::new() });
    } else if !app.writing {
        part("F1 help".into(), FAINT);
    }
    if let Some(rate) = app.meter.rate {
        part(format!("{rate:.1} tokens/s"), Style::new());
    }
    if app.meter.used > 0 {
        let share = 100.0 * app.meter.used as f64 / app.context.max(1) as f64;
        part(format!("context {} of {} ({share:.0} %)", app.meter.used, app.context), Style::new());
    }
    Line::from(spans)
}

fn help(frame: &mut Frame<'_>, area: Rect) {
    let text = format!("{}\n\n{}", keys::HELP, command::HELP);
    let width = text.lines().map(str::len).max().unwrap_or_default() as u16 + 4;
    let height = text.lines().count() as u16 + 2;
    let area = area.centered(Constraint::Length(width), Constraint::Length(height));
    let block = bordered(true).title(" Help (any key closes it) ");
    frame.render_widget(Clear, area);
    frame.render_widget(
        Paragraph::new(text).block(block.padding(ratatui::widgets::Padding::horizontal(1))),
        area,
    );
}
